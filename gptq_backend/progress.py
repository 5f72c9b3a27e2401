"""What a long run has done, in a folder beside its output, so that the same run, begun again, goes on from there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from .errors import ConfigError

logger = logging.getLogger(__name__)

_SUFFIX, _PARTIAL = ".safetensors", ".partial"
_KEY = "gptq_backend.progress"  # of the metadata: the digest
_FACTS = "gptq_backend.facts"


class Progress:
    """Entries of tensors and facts, each in a file that appears whole, with the digest of all that it depends on.

    Args:
        folder: where; made with the first entry. None: nothing is kept.

    Raises:
        ConfigError: something else is there, which would be lost.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._warned = False
        if self.folder is None or not self.folder.exists():
            return
        try:
            strangers = [path.name for path in self.folder.iterdir() if not _is_ours(path)]
        except OSError as error:
            raise ConfigError(
                f"{folder} cannot be read as the progress of an earlier run ({error.strerror}); move it away"
            ) from None
        if strangers:
            raise ConfigError(
                f"{folder}, where the progress of the run would be kept and then removed, holds something else "
                f"({min(strangers)}); move it away"
            )

    def save(self, name: str, digest: str, tensors: Mapping[str, Tensor], facts: Any) -> None:
        """Keep an entry; ``facts`` are JSON values."""
        if self.folder is None:
            return
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{name}{_SUFFIX}"
        partial = path.with_name(path.name + _PARTIAL)
        held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        save_file(held, partial, metadata={_KEY: digest, _FACTS: json.dumps(facts)})
        os.replace(partial, path)

    def load(self, name: str, digest: str) -> tuple[dict[str, Tensor], Any] | None:
        """The entry, if there is one with this digest."""
        path = None if self.folder is None else self.folder / f"{name}{_SUFFIX}"
        if path is None or not path.exists():
            return None
        with safe_open(path, "pt") as file:
            metadata = file.metadata()
            if metadata[_KEY] == digest:
                return {key: file.get_tensor(key) for key in file.keys()}, json.loads(metadata[_FACTS])  # noqa: SIM118
        if not self._warned:
            self._warned = True
            logger.warning("%s is of another run (other model, data or settings); starting over", self.folder)
        return None

    def remove(self) -> None:
        """The run is over."""
        if self.folder is not None:
            shutil.rmtree(self.folder, ignore_errors=True)


def digest(before: str, facts: Any, tensors: Iterable[Tensor]) -> str:
    """Of JSON values and tensors, and of the digest ``before`` them."""
    found = hashlib.sha256(json.dumps([before, facts], sort_keys=True, default=str).encode())
    for tensor in tensors:
        found.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
        found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()


def _is_ours(path: Path) -> bool:
    """An entry, or what a process that was killed left of one."""
    if path.name.endswith(_SUFFIX + _PARTIAL):
        return True
    try:
        with safe_open(path, "pt") as file:
            return path.suffix == _SUFFIX and _KEY in (file.metadata() or {})
    except (SafetensorError, OSError):
        return False
