"""Who still lives: a file that its process holds locked, which the system lets go of however the process ends.

Folders and files that a process makes for a while carry such a lock, so that a later process knows what was left behind
by a dead one, and takes nothing from a live one.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

logger = logging.getLogger(__name__)

_NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF}
_HELD = {errno.EAGAIN, errno.EWOULDBLOCK, errno.EACCES, errno.EDEADLK}
_SCRATCH = re.compile(r"gptq-(offload|view|bench)-[a-z0-9_]{8}")
_LOCK = ".lock"  # in a scratch folder


@dataclass
class Claim:
    """A file that this process has open, and whether its lock says so to others (some file systems have no locks)."""

    path: Path
    descriptor: int | None
    locked: bool

    def close(self, remove: bool = False) -> None:
        """Let go of the file, if that was not done; with ``remove``, delete it too, while it is still held."""
        if self.descriptor is None:
            return
        with suppress(OSError):  # of another user, in a folder that lets nobody else remove it
            if remove and os.name != "nt":
                self.path.unlink(missing_ok=True)
        os.close(self.descriptor)
        self.descriptor = None
        with suppress(OSError):
            if remove and os.name == "nt":  # which does not delete open files
                self.path.unlink(missing_ok=True)


def claim(path: Path) -> Claim:
    """Open ``path`` for writing, making it if need be, and lock it until it is closed or the process ends.

    Raises:
        BlockingIOError: a live process holds it. OSError: it cannot be opened.
    """
    while True:
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            if not path.exists():
                raise
            descriptor = os.open(path, os.O_RDONLY)  # left by another user; local file systems lock it all the same
        try:
            locked = _lock(descriptor)
            with suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    return Claim(path, descriptor, locked)
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)  # its holder removed it between our opening and locking it: what we hold has no name


def _lock(descriptor: int) -> bool:
    """Whether the file is locked now; False where the file system has no locks. BlockingIOError: it is by another."""
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined,unused-ignore]
        else:
            import fcntl

            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in _HELD:
            raise BlockingIOError(error.errno, error.strerror) from None
        if error.errno in _NO_LOCKS:
            return False
        raise
    return True


def claim_dead(path: Path) -> Claim | None:
    """The claim of an existing file that no live process holds; None where one does, or nobody can know."""
    try:
        if path.is_symlink() or not path.exists():
            return None
        found = claim(path)
    except OSError:
        return None
    if found.locked:
        return found
    found.close()
    return None


def write_text(path: Path, content: str) -> None:
    """Write a text file (UTF-8) whole or not at all, and remove what killed processes left of it earlier.

    What is not a plain file, like a pipe, is written to as it is.
    """
    if path.exists() and not path.is_file():
        path.write_text(content, encoding="utf-8")
        return
    target = Path(os.path.realpath(path))
    pattern = re.compile(rf"\.{re.escape(target.name)}\.[0-9a-f]{{8}}\.partial")
    for sibling in target.parent.iterdir():
        if pattern.fullmatch(sibling.name) and (dead := claim_dead(sibling)) is not None:
            dead.close(remove=True)
    path, partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial"), None
    try:
        partial = claim(path)
        assert partial.descriptor is not None
        with open(partial.descriptor, "w", encoding="utf-8", closefd=False) as file:
            file.write(content)
        os.fsync(partial.descriptor)
        if target.exists():  # who may read it may read what replaces it
            partial.path.chmod(stat.S_IMODE(target.stat().st_mode))
        if os.name == "nt":  # which does not rename open files
            partial.close()
        os.replace(partial.path, target)
    except BaseException:
        if partial is not None:
            partial.close(remove=True)
        else:  # a signal came while it was made
            with suppress(OSError):
                path.unlink(missing_ok=True)
        raise
    partial.close()


class Scratch:
    """A folder for temporary files, ``gptq-PURPOSE-*``; with it, those that dead processes left are removed.

    Args:
        purpose: "offload", "view" or "bench".
    """

    def __init__(self, purpose: str) -> None:
        clear_scratch()
        while True:
            self.path = tempfile.mkdtemp(prefix=f"gptq-{purpose}-")
            with suppress(FileNotFoundError):  # somebody cleared it away before it was locked
                self._held = claim(Path(self.path) / _LOCK)
                break

    def remove(self) -> None:
        """Remove it with all that is in it. Idempotent."""
        if os.name == "nt":
            self._held.close()
        shutil.rmtree(self.path, ignore_errors=True)
        self._held.close()


@contextmanager
def scratch_folder(purpose: str) -> Iterator[str]:
    """The path of a :class:`Scratch` that is removed in the end."""
    scratch = Scratch(purpose)
    try:
        yield scratch.path
    finally:
        scratch.remove()


def clear_scratch() -> None:
    """Remove the scratch folders of this user's dead processes, and say so."""
    cleared = []
    with suppress(OSError):
        for folder in Path(tempfile.gettempdir()).iterdir():
            with suppress(OSError):
                if _SCRATCH.fullmatch(folder.name) and _is_own_folder(folder) and _clear(folder):
                    cleared.append(folder.name)
    if cleared:
        logger.warning("removed temporary folders of runs that were killed: %s", ", ".join(sorted(cleared)))


def _is_own_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink() and (os.name == "nt" or path.stat().st_uid == os.getuid())


def _clear(folder: Path) -> bool:
    """Remove a scratch folder whose process is dead -> whether that was so."""
    if (folder / _LOCK).exists():
        if (dead := claim_dead(folder / _LOCK)) is None:
            return False
        if os.name == "nt":
            dead.close()
        shutil.rmtree(folder, ignore_errors=True)
        dead.close()
    else:
        folder.rmdir()  # empty: its process died between making and locking it, or else it makes another one
    return not folder.exists()
