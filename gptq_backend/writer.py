"""Write a checkpoint folder so that it exists whole or not at all."""

from __future__ import annotations

import errno
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from .config import QuantizeConfig
from .errors import CheckpointError

_MAX_SHARD_BYTES = 5 * 10**9


def check_output(folder: str | Path, overwrite: bool = False) -> None:
    """Refuse a folder that holds something, before any work is done for it.

    Raises:
        CheckpointError: it is a file, or not empty while ``overwrite`` is off.
    """
    path = Path(folder)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; expected a new or empty folder: choose another name")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise CheckpointError(f"{path} already exists and is not empty; choose another folder or allow overwriting it")


@contextmanager
def atomic_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder`` that takes its place on success and vanishes on any exception.

    Raises:
        CheckpointError: as :func:`check_output`, or its parent cannot be written, or the disk is full (whatever library
            found out).
    """
    check_output(folder, overwrite)
    path = Path(folder).resolve()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        beside = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
    except OSError as error:
        raise CheckpointError(f"{path.parent} cannot be written ({error.strerror}); choose another folder") from None
    old = beside.with_suffix(".replaced")
    try:
        yield beside
        beside.chmod(0o755)  # mkdtemp makes it private
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
    shards: list[dict[str, Tensor]] = [{}]
    size, seen = 0, set()
    for name, tensor in tensors.items():
        identity = (tensor.untyped_storage().data_ptr(), tensor.storage_offset(), tensor.shape, tensor.stride())
        if tensor.numel() and identity in seen:
            continue
        seen.add(identity)
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor.detach().cpu().contiguous()
        size += tensor.nbytes
    total = sum(tensor.nbytes for shard in shards for tensor in shard.values())
    settings = {**(model_config or {}), "quantization_config": config.to_dict()}
    with atomic_folder(folder, overwrite) as beside:
        where = {}
        for i, shard in enumerate(shards, start=1):
            single = len(shards) == 1
            file = "model.safetensors" if single else f"model-{i:05d}-of-{len(shards):05d}.safetensors"
            save_file(shard, beside / file, metadata={"format": "pt"})
            where.update(dict.fromkeys(shard, file))
        if len(shards) > 1:
            index = {"metadata": {"total_size": total}, "weight_map": where}
            (beside / "model.safetensors.index.json").write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
        (beside / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n")
