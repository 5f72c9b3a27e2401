"""What a long run has done, in a folder beside its output, so that the same run, begun again, goes on from there."""

from __future__ import annotations

import errno
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
from safetensors.torch import save_file
from torch import Tensor

from ..errors import ConfigError
from ..version import __version__

logger = logging.getLogger(__name__)

_FILE = re.compile(r"(?P<name>.+)\.[0-9a-f]{16}\.(safetensors|json)(\.partial)?")
_FULL = {errno.ENOSPC, errno.EDQUOT}


class Progress:
    """Entries of tensors and facts, each of which appears whole; the digest of all that it depends on is a part of its
    files' names, so that runs with other settings, models or data do not take each other's, nor lose them until one of
    them has ended.

    Args:
        folder: where; made with the first entry. None: nothing is kept, and nothing found.

    Attributes:
        files: those with the tensors of the entries that this run has kept or taken, by name.
        stored_names: what the files call tensors of these names.

    Raises:
        ConfigError: something else is there.
    """

    def __init__(self, folder: str | Path | None) -> None:
        self.folder = None if folder is None else Path(folder)
        self.files: dict[str, Path] = {}
        self.stored_names: Callable[[Iterable[str]], Mapping[str, str]] = lambda names: {name: name for name in names}
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
        """Of this library's version and torch's, JSON values and tensors, and of the digest ``before`` them; "" where
        nothing is kept.
        """
        if self.folder is None:
            return ""
        found = hashlib.sha256(json.dumps([__version__, torch.__version__, before, facts], default=str).encode())
        for tensor in tensors:
            _hash(found, tensor)
        return found.hexdigest()

    def save(self, name: str, digest: str, entry: Callable[[], tuple[Mapping[str, Tensor], Any]]) -> None:
        """Keep an entry. Where that fails, a warning says so, and no more are kept.

        ``digest`` is of all that it depends on. ``entry`` gives tensors and facts, which are JSON values; it is not
        called where nothing is kept.

        Raises:
            OSError: the disk is full. Whoever frees some can go on from the entries before.
        """
        if self.folder is None or not self._writable:
            return
        tensors, facts = entry()
        names = self.stored_names(tensors)
        held = {names[key]: tensor for key, tensor in _apart(tensors).items()}
        path = self._path(name, digest)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps({"names": {names[key]: key for key in tensors}, "facts": facts})
            _appear(path.with_suffix(".json"), lambda partial: partial.write_text(text, encoding="utf-8"))
            _appear(path, lambda partial: save_file(held, partial, metadata={"format": "pt"}))
        except (OSError, SafetensorError) as error:
            if getattr(error, "errno", None) in _FULL or "No space left" in str(error):
                raise
            logger.warning("the progress can no longer be kept in %s: %s", self.folder, error)
            self._writable = False
        else:
            self.files[name] = path

    def load(self, name: str, digest: str) -> tuple[dict[str, Tensor], Any] | None:
        """The entry, if there is one with this digest."""
        if self.folder is None or not self.folder.exists():
            return None
        path = self._path(name, digest)
        if path.exists():
            try:
                described = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
                with safe_open(path, "pt") as file:
                    tensors = {own: file.get_tensor(key) for key, own in described["names"].items()}
                facts = described["facts"]
            except (SafetensorError, OSError, TypeError, LookupError, ValueError, AttributeError):
                logger.warning("%s is damaged and not taken", path)
                return None
            self._warn("going on with what an earlier run kept in %s")
            self.files[name] = path
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


def fingerprint(tensor: Tensor) -> str:
    """Of its dtype, shape and values."""
    found = hashlib.sha256()
    _hash(found, tensor)
    return found.hexdigest()


def _hash(found: Any, tensor: Tensor) -> None:
    found.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
    found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)


def _apart(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """On the CPU, none in the memory of another one, which the files' format refuses."""
    found, seen = {}, set()
    for key, tensor in tensors.items():
        held = tensor.detach().cpu().contiguous()
        found[key] = held.clone() if (place := held.untyped_storage().data_ptr()) in seen else held
        seen.add(place)
    return found


def _appear(path: Path, write: Callable[[Path], object]) -> None:
    """Let a file be whole when it has its name, also after a power failure."""
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
        raise


def _is_ours(path: Path) -> bool:
    """An entry, or what a process that was killed left of one."""
    return _FILE.fullmatch(path.name) is not None and path.is_file()
