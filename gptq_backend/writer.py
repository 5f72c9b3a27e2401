"""Write a checkpoint folder so that it exists whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .config import QuantizeConfig
from .errors import CheckpointError
from .phases import timed

_MAX_SHARD_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"


def check_output(folder: str | Path, overwrite: bool = False) -> None:
    """Refuse a folder that holds something, before any work is done for it.

    Raises:
        CheckpointError: it is a file or a mount point, or not empty while ``overwrite`` is off.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; expected a new or empty folder: choose another name")
    if path.resolve().is_mount():  # of "." the parent would be itself
        raise CheckpointError(f"{path} is a mount point, which a finished folder cannot replace; name one inside it")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise CheckpointError(f"{path} already exists and is not empty; choose another folder or allow overwriting it")


@contextmanager
def atomic_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder`` that takes its place on success and vanishes on any exception.

    A process that is killed leaves it: ``.NAME.*.partial``.

    Raises:
        CheckpointError: as :func:`check_output`, or its parent cannot be written, or the disk is full (whatever library
            found out).
    """
    check_output(folder, overwrite)
    path = Path(folder).resolve()
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise CheckpointError(f"{path.parent} cannot be written ({error.strerror}); choose another folder") from None
    old = beside.with_suffix(".replaced")
    try:
        yield beside
        for made_private in (beside, *beside.rglob("*")):  # by mkdtemp, and files by some versions of safetensors
            follow_umask(made_private)
        if path.exists():
            path.rename(old)
        beside.rename(path)
    except (OSError, SafetensorError) as error:
        if (isinstance(error, OSError) and error.errno == errno.ENOSPC) or "No space left" in str(error):
            raise CheckpointError(
                f"no space left on the disk of {path.parent}; nothing was written: free some"
            ) from None
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        if old.exists() and not path.exists():
            old.rename(path)
        shutil.rmtree(old, ignore_errors=True)
        for parent in made:  # from the inside out, those that are still empty
            with suppress(OSError):
                parent.rmdir()


def follow_umask(path: Path) -> None:
    """Give a file or folder the permissions that a plain ``open`` or ``mkdir`` would."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def write_checkpoint(
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    config: QuantizeConfig,
    model_config: Mapping[str, Any] | None = None,
    *,
    max_shard_bytes: int = _MAX_SHARD_BYTES,
    overwrite: bool = False,
) -> None:
    """Write a state dict as a checkpoint folder that transformers and vLLM can read.

    Args:
        tensors: ``model.state_dict()`` of a model with QuantLinear layers; tensors that share memory are written once.
        folder: new or empty, unless ``overwrite``.
        config: becomes ``quantization_config``.
        model_config: the rest of ``config.json``.
        max_shard_bytes: start another file beyond this size.

    Raises:
        CheckpointError: see :func:`atomic_folder`.
    """
    seen, unique = set(), {}
    for name, tensor in tensors.items():
        identity = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if not tensor.numel() or identity not in seen:
            unique[name] = tensor
        seen.add(identity)
    settings = {**(model_config or {}), "quantization_config": config.to_dict()}
    with atomic_folder(folder, overwrite) as beside:
        shards = Shards(beside, max_shard_bytes)
        for name, tensor in unique.items():
            shards.add({name: tensor})
        shards.flush()
        shards.finish()
        (beside / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")


class Shards:
    """Weight files of a checkpoint, written while the tensors come: memory holds one of them.

    Args:
        folder: where to write; what goes wrong there is for its owner to clean up.
        max_bytes: tensors that would make a file larger go to the next one.
    """

    def __init__(self, folder: Path, max_bytes: int = _MAX_SHARD_BYTES) -> None:
        self.folder, self.max_bytes = folder, max_bytes
        self.pending: dict[str, Tensor] = {}
        self.files: dict[Path, list[str]] = {}  # and the names of the tensors in each
        self.bytes = 0  # in the files

    def add(self, tensors: Mapping[str, Tensor]) -> Path | None:
        """Take tensors that belong into one file -> the file that was written to make room, or None."""
        size = sum(tensor.nbytes for tensor in (*self.pending.values(), *tensors.values()))
        written = self.flush() if self.pending and size > self.max_bytes else None
        self.pending.update(tensors)
        return written

    @timed("write")
    def flush(self) -> Path:
        """Write what is pending."""
        path = self.folder / f"part-{len(self.files) + 1}.safetensors"
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.pending.items()}
        save_file(tensors, path, metadata={"format": "pt"})
        self.adopt(path, tensors)
        self.pending.clear()
        return path

    def adopt(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        """Count a file in the folder that somebody else wrote with these tensors."""
        self.files[path] = list(tensors)
        self.bytes += sum(tensor.nbytes for tensor in tensors.values())

    def finish(self) -> None:
        """Give the files their final names, and several an index."""
        if len(self.files) == 1:
            next(iter(self.files)).rename(self.folder / "model.safetensors")
            return
        where = {}
        for number, (path, names) in enumerate(self.files.items(), start=1):
            final = f"model-{number:05d}-of-{len(self.files):05d}.safetensors"
            path.rename(self.folder / final)
            where.update(dict.fromkeys(names, final))
        index = {"metadata": {"total_size": self.bytes}, "weight_map": where}
        (self.folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
