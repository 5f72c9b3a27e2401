"""Can the header of a GGUF file be read in bounded time and memory, and are all its tensors inside the file?

Readers of this format trust the counts in it: one of ``2**60`` keeps them busy, and takes memory, until somebody stops
them. Here each count is compared with what is left of the file before anything is done that many times.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import BinaryIO

from ..errors import CheckpointError
from .headers import FETCH_AGAIN, require_regular

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
# Bytes of a value, by its type's number; 8 is a string, 9 an array.
_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 4
_REPEATS = (".block_count", ".expert_count")  # settings that a model repeats modules by


class _Header:
    """Reads little-endian numbers and skips the rest. Raises CheckpointError at the end of the file."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, path.stat().st_size

    def number(self, kind: str) -> int:
        found: int = struct.unpack(f"<{kind}", self.read(struct.calcsize(kind)))[0]
        return found

    def read(self, count: int) -> bytes:
        self.require(count)
        return self.file.read(count)

    def skip(self, count: int) -> None:
        self.require(count)
        self.file.seek(count, 1)

    def require(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise self.error(f"ends at byte {self.size}, expected {count} more after byte {self.file.tell()}")

    def string(self) -> bytes:
        return self.read(self.number("Q"))

    def error(self, what: str) -> CheckpointError:
        return CheckpointError(f"{self.path} {what}; {FETCH_AGAIN}")


def check_header(path: Path) -> None:
    """See the module.

    Raises:
        CheckpointError: it is no such file, is truncated, or its header names more than the file can hold.
    """
    require_regular(path)
    with path.open("rb") as file:
        header = _Header(path, file)
        if header.size < 24 or header.read(4) != _MAGIC:
            raise header.error("does not begin like a GGUF file")
        if (version := header.number("I")) not in _VERSIONS:
            raise header.error(f"has version {version}, expected one of {_VERSIONS} in little-endian order")
        tensors, settings = header.number("Q"), header.number("Q")
        header.require(24 * tensors + 13 * settings)  # the least that each takes
        alignment = 32
        for _ in range(settings):
            name, value = header.string(), _setting(header)
            if name == b"general.alignment" and value:
                alignment = value
            if name.decode("utf-8", "replace").endswith(_REPEATS) and value is not None and value > max(tensors, 1):
                raise header.error(f"says {name.decode('utf-8', 'replace')}={value}, but holds only {tensors} tensors")
        last = max((_tensor(header) for _ in range(tensors)), default=0)
        start = -(-file.tell() // alignment) * alignment
        if start + last > header.size:
            raise header.error(f"has {header.size} bytes, expected at least {start + last} with all its tensors")


def _setting(header: _Header) -> int | None:
    """Skip a value; return it if it is a 32-bit number without sign, as counts are."""
    kind = header.number("I")
    if kind == 4:
        return header.number("I")
    if kind == _STRING:
        header.string()
    elif kind == _ARRAY:
        kind, count = header.number("I"), header.number("Q")
        if kind == _STRING:
            header.require(8 * count)
            for _ in range(count):
                header.skip(header.number("Q"))
        else:
            header.skip(count * _size(header, kind))
    else:
        header.skip(_size(header, kind))
    return None


def _size(header: _Header, kind: int) -> int:
    if kind not in _SIZES:  # arrays of arrays, too, which no model has
        raise header.error(f"has a setting of type {kind}, expected one of GGUF's")
    return _SIZES[kind]


def _tensor(header: _Header) -> int:
    """Where, counted from the first, the tensor ends at the earliest."""
    name, dimensions = header.string(), header.number("I")
    if dimensions > _MOST_DIMENSIONS:
        raise header.error(f"has a tensor of {dimensions} dimensions ({name[:60]!r}), expected at most 4")
    elements = math.prod(header.number("Q") for _ in range(dimensions))
    header.number("I")
    return header.number("Q") + elements // 8  # no type has less than a bit of each
