"""What a long run has done, in a folder beside its output, so that the same run, begun again, goes on from there."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ..errors import ConfigError
from ..version import __version__

logger = logging.getLogger(__name__)

_FILE = re.compile(r"(?P<name>.+)\.[0-9a-f]{16}\.safetensors(\.partial)?")
_FACTS = "gptq_backend.progress"  # in the metadata


class Progress:
    """Entries of tensors and facts, each in a file that appears whole; the digest of all that it depends on is a part
    of the file's name, so that runs with other settings, models or data do not take each other's, nor lose them until
    one of them has ended.

    Args:
        folder: where; made with the first entry. None: nothing is kept, and nothing found.

    Raises:
        ConfigError: something else is there.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._warned, self._writable = False, True
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
                f"{folder}, where the progress of the run would be kept, holds something else ({min(strangers)}); "
                "move it away"
            )

    def digest(self, before: str, facts: Any, tensors: Iterable[Tensor]) -> str:
        """Of this library's version, JSON values and tensors, and of the digest ``before`` them; "" where nothing is
        kept.
        """
        if self.folder is None:
            return ""
        found = hashlib.sha256(json.dumps([__version__, before, facts], default=str).encode())
        for tensor in tensors:
            found.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def save(self, name: str, digest: str, entry: Callable[[], tuple[Mapping[str, Tensor], Any]]) -> None:
        """Keep an entry. Where that fails, a warning says so, and no more are kept.

        ``digest`` is of all that it depends on. ``entry`` gives tensors and facts, which are JSON values; it is not
        called where nothing is kept.
        """
        if self.folder is None or not self._writable:
            return
        tensors, facts = entry()
        path = self._path(name, digest)
        partial = path.with_name(path.name + ".partial")
        held = {key: tensor.detach().cpu().contiguous() for key, tensor in tensors.items()}
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                file.write(save(held, metadata={_FACTS: json.dumps(facts)}))
                file.flush()
                os.fsync(file.fileno())  # or a power failure could leave an empty file under the final name
            os.replace(partial, path)
        except OSError as error:
            logger.warning("the progress can no longer be kept in %s: %s", self.folder, error.strerror)
            with suppress(OSError):
                partial.unlink(missing_ok=True)
            self._writable = False

    def load(self, name: str, digest: str) -> tuple[dict[str, Tensor], Any] | None:
        """The entry, if there is one with this digest."""
        if self.folder is None or not self.folder.exists():
            return None
        path = self._path(name, digest)
        if path.exists():
            try:
                with safe_open(path, "pt") as file:
                    tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
                    facts = json.loads(file.metadata()[_FACTS])
            except (SafetensorError, OSError, TypeError, LookupError, ValueError):
                logger.warning("%s is damaged and not taken", path)
                return None
            self._warn("going on with what an earlier run kept in %s")
            return tensors, facts
        names = [found["name"] for entry in self.folder.iterdir() if (found := _FILE.fullmatch(entry.name))]
        if name in names:
            self._warn("%s holds the progress of another run (other model, text, settings or version); starting over")
        return None

    def kept(self) -> bool:
        """Whether there is an entry, of whatever run."""
        return self.folder is not None and self.folder.is_dir() and any(map(_is_ours, self.folder.iterdir()))

    def remove(self) -> None:
        """The run is over: remove the entries, and the folder if nothing else came into it."""
        if self.folder is None or not self.folder.is_dir():
            return
        for path in self.folder.iterdir():
            if _is_ours(path):
                with suppress(OSError):  # the result is complete
                    path.unlink()
        with suppress(OSError):
            self.folder.rmdir()

    def _path(self, name: str, digest: str) -> Path:
        assert self.folder is not None
        return self.folder / f"{name}.{digest[:16]}.safetensors"

    def _warn(self, text: str) -> None:
        if not self._warned:
            self._warned = True
            logger.warning(text, self.folder)


def _is_ours(path: Path) -> bool:
    """An entry, or what a process that was killed left of one."""
    return _FILE.fullmatch(path.name) is not None and path.is_file()
