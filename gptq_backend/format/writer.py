"""Write the files of a checkpoint folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..config import QuantizeConfig
from ..output_folder import atomic_folder
from ..timing import timed

_MAX_SHARD_BYTES = 5 * 10**9
_INDEX = "model.safetensors.index.json"


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
        CheckpointError: see :func:`.output.atomic_folder`.
    """
    settings, seen = {**(model_config or {}), "quantization_config": config.to_dict()}, set()
    with atomic_folder(folder, overwrite) as beside:
        shards = Shards(beside, max_shard_bytes)
        for name, tensor in tensors.items():
            identity = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
            if not tensor.numel() or identity not in seen:
                shards.add({name: tensor})
            seen.add(identity)
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
