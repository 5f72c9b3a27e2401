"""What a checkpoint's files hold: names, dtypes and shapes of all tensors, and the values of single ones on demand.

Headers are parsed by the safetensors library, which checks every length, offset and shape against the file before
anything is allocated. Pickled files are read as plain tensors only, never with anything that would run code.
"""

from __future__ import annotations

import math
import stat
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..errors import CheckpointError

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


def require_regular(path: Path) -> None:
    """Refuse what must not be opened: opening a pipe waits for a writer, and a device need not end.

    Raises:
        CheckpointError: ``path``, links followed, is missing or not a regular file.
    """
    try:
        mode = path.stat().st_mode
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{path} cannot be read ({reason}); check the path and its permissions") from None
    if not stat.S_ISREG(mode):
        kind = "a folder" if stat.S_ISDIR(mode) else "a pipe, socket or device"
        raise CheckpointError(f"{path} is {kind}, expected a file; fetch it again")


@dataclass(frozen=True)
class TensorFile:
    """A file of tensors, opened once, at its first use: opening a safetensors file parses its whole header."""

    path: Path  # a safetensors file, or by any other name a pickled one

    def __reduce__(self) -> tuple[Any, ...]:  # an open file cannot be pickled
        return TensorFile, (self.path,)

    def manifest(self) -> Manifest:
        """All its tensors.

        Raises:
            CheckpointError: it cannot be read, is truncated, tampered with, or holds code.
        """
        if self.path.suffix != ".safetensors":
            return {
                name: TensorInfo(tensor.dtype, tuple(tensor.shape), self, name)
                for name, tensor in self._pickled.items()
            }
        manifest = {}
        for key in list(self._safetensors.keys()):  # it is no mapping
            found = self._safetensors.get_slice(key)
            manifest[key] = TensorInfo(_DTYPES.get(found.get_dtype()), tuple(found.get_shape()), self, key)
        return manifest

    def tensor(self, key: str) -> Tensor:
        """The values of one tensor, in the dtype of the file."""
        if self.path.suffix != ".safetensors":
            return self._pickled[key].clone()
        try:
            tensor: Tensor = self._safetensors.get_tensor(key)
        except SafetensorError as error:
            raise CheckpointError(f"{self.path}: {error}; {FETCH_AGAIN}") from None
        return tensor

    @cached_property
    def _safetensors(self) -> Any:
        require_regular(self.path)
        try:
            return safe_open(self.path, framework="pt")
        except (SafetensorError, OSError) as error:
            reason = _first_line(error).removeprefix("Error while deserializing header: ")
            raise CheckpointError(
                f"{self.path}, which has {self.path.stat().st_size} bytes, cannot be read as safetensors "
                f"({reason}); {FETCH_AGAIN}"
            ) from None

    @cached_property
    def _pickled(self) -> dict[str, Tensor]:
        require_regular(self.path)
        return _load_pickle(self.path)


@dataclass(frozen=True)
class TensorInfo:
    """One stored tensor."""

    dtype: torch.dtype | None  # None for types that no torch of ours knows by name, which no quantized layer has
    shape: tuple[int, ...]
    file: TensorFile
    key: str  # its name in that file, which a manifest with a model's own names may not have as its key

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        """Size in the file; 0 for types not known here."""
        return self.numel * self.dtype.itemsize if self.dtype else 0


Manifest = dict[str, TensorInfo]


def read_manifest(files: Sequence[str | Path]) -> Manifest:
    """Names, dtypes and shapes of all tensors, from headers only (a pickled ``.bin`` is mapped, not read).

    Raises:
        CheckpointError: see :meth:`TensorFile.manifest`.
    """
    manifest: Manifest = {}
    for file in files:
        manifest.update(TensorFile(Path(file)).manifest())
    return manifest


def read_tensor(info: TensorInfo) -> Tensor:
    """The values of one tensor, in the dtype of the file."""
    return info.file.tensor(info.key)


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """Tensors of a ``.bin`` or ``.pt``; nothing larger than the file itself."""
    size = file.stat().st_size
    try:
        if _is_compressed(file):
            raise CheckpointError(
                f"{file} holds compressed entries, which torch.save never writes; convert it to safetensors where it "
                "was made"
            )
        try:
            content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # written by a torch before 1.6, whose files cannot be mapped
            content = torch.load(file, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except Exception as error:  # a damaged archive or pickle raises any kind
        raise CheckpointError(
            f"{file} cannot be read as plain tensors ({_first_line(error)}); fetch it again, or convert it to "
            "safetensors where it was made"
        ) from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} holds a {type(content).__name__}, expected a dictionary of tensors")
    if isinstance(content.get("state_dict"), dict):  # frameworks would find no tensor in it
        raise CheckpointError(f"{file} holds a dictionary with the tensors under 'state_dict'; save that part alone")
    tensors = {name: value for name, value in content.items() if isinstance(value, Tensor)}
    for name, tensor in tensors.items():
        if not isinstance(name, str) or tensor.layout != torch.strided or tensor.is_quantized:
            raise CheckpointError(
                f"{file}: {name!r} is a {tensor.layout} tensor, expected plain tensors with names; convert the file to "
                "safetensors where it was made"
            )
        if tensor.numel() * tensor.element_size() > size:  # a view that repeats few bytes: copying would make it real
            raise CheckpointError(
                f"{file}: {name} is a tensor of {list(tensor.shape)} in a file of {size} bytes; {FETCH_AGAIN}"
            )
    return tensors


def _is_compressed(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        return any(entry.compress_type for entry in archive.infolist())


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
