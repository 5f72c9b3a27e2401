"""What a checkpoint's files hold: names, dtypes and shapes from safetensors headers, and single tensors on demand."""

from __future__ import annotations

import json
import math
import os
import pickle
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .errors import CheckpointError

_HEADER_LIMIT = 100 << 20  # what the safetensors library accepts
FETCH_AGAIN = "the file is damaged or was changed: fetch it again"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor.

    Args:
        dtype: None for types that no torch of ours knows by name; such tensors are none of a quantized layer's.
        shape: as stored.
        file: where it is.
        key: its name in that file, which a manifest with a model's own names may not have as its key.
    """

    dtype: torch.dtype | None
    shape: tuple[int, ...]
    file: Path
    key: str

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


Manifest = dict[str, TensorInfo]


def read_manifest(files: Sequence[str | Path]) -> Manifest:
    """Names, dtypes and shapes of all tensors, from headers only (a pickled ``.bin`` is mapped, not read).

    Raises:
        CheckpointError: a file is truncated, tampered with, or holds code.
    """
    manifest: Manifest = {}
    for file in map(Path, files):
        manifest.update(_read_header(file) if file.suffix == ".safetensors" else _read_pickled_header(file))
    return manifest


def read_tensor(info: TensorInfo) -> Tensor:
    """The values of one tensor, in the dtype of the file."""
    if info.file.suffix != ".safetensors":
        return _load_pickle(info.file)[info.key].clone()
    try:
        with safe_open(info.file, framework="pt") as file:
            return file.get_tensor(info.key)
    except SafetensorError as error:
        raise CheckpointError(f"{info.file}: {error}; {FETCH_AGAIN}") from None


def _read_header(file: Path) -> Manifest:
    try:
        size = os.path.getsize(file)
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(_HEADER_LIMIT, size - 8):
                raise CheckpointError(
                    f"{file}: the header claims {length} bytes in a file of {size}; it is truncated or no safetensors "
                    "file: fetch it again"
                )
            header = json.loads(stream.read(length).decode("utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}; check the path and its permissions") from None
    except ValueError as error:
        if isinstance(error, CheckpointError):
            raise
        raise CheckpointError(f"{file}: its header is not valid JSON; {FETCH_AGAIN}") from None
    if not isinstance(header, dict):
        raise CheckpointError(f"{file}: its header is a {type(header).__name__}, expected an object; {FETCH_AGAIN}")
    header.pop("__metadata__", None)
    manifest, spans = {}, []
    for name, entry in header.items():
        try:
            dtype, shape = str(entry["dtype"]), tuple(map(int, entry["shape"]))
            first, last = map(int, entry["data_offsets"])
        except (KeyError, TypeError, ValueError):
            raise CheckpointError(f"{file}: the header's entry for {name} is incomplete; {FETCH_AGAIN}") from None
        info = TensorInfo(_DTYPES.get(dtype), shape, file, name)
        if info.dtype is not None and info.numel * info.dtype.itemsize != last - first:
            raise CheckpointError(
                f"{file}: {name} has {last - first} bytes, expected {info.numel * info.dtype.itemsize} for "
                f"{dtype} {list(shape)}; {FETCH_AGAIN}"
            )
        manifest[name] = info
        spans.append((first, last, name))
    end = 0
    for first, last, name in sorted(spans):
        if first != end or last < first:
            raise CheckpointError(f"{file}: {name} starts at byte {first}, expected {end}; {FETCH_AGAIN}")
        end = last
    if 8 + length + end != size:
        raise CheckpointError(f"{file} has {size} bytes, expected {8 + length + end}; {FETCH_AGAIN}")
    return manifest


def _read_pickled_header(file: Path) -> Manifest:
    content = _load_pickle(file)
    return {
        name: TensorInfo(tensor.dtype, tuple(tensor.shape), file, name)
        for name, tensor in content.items()
        if isinstance(tensor, Tensor)
    }


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """Tensors of a ``.bin`` or ``.pt``, never anything that would run code."""
    try:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written by a torch before 1.6, whose files cannot be mapped
            content = torch.load(file, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError) as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{file} cannot be read as plain tensors ({reason}); fetch it again, or convert it to safetensors where it "
            "was made"
        ) from None
    content = content.get("state_dict", content) if isinstance(content, dict) else content
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected a dictionary of tensors")
    return content
