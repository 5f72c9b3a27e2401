"""An output folder that appears whole or not at all, however the process ends, and takes nothing of the user's with it.

Beside the folder NAME lie, while a run writes it, ``.NAME.lock`` (held by that run: a second one is refused),
``.NAME.XXXXXXXX.partial`` (what is being written) and, only where the file system cannot swap two names in one step and
only for that moment, ``.NAME.XXXXXXXX.replaced`` (the old folder). Whoever holds the lock knows that the others were
left by a dead run: the next run puts back what was moved aside and removes what was half-written.
"""

from __future__ import annotations

import ctypes
import errno
import itertools
import logging
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

from .errors import CheckpointError
from .locks import claim

logger = logging.getLogger(__name__)

# What a rename onto a folder with something in it, or a file, says.
_TAKEN = {errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR}
_FULL = {errno.ENOSPC, errno.EDQUOT}
_FULL_WORDS = ("No space left on device", "Disk quota exceeded")


def check_output(folder: str | Path, overwrite: bool = False) -> None:
    """Refuse a folder that holds something, before any work is done for it.

    Raises:
        CheckpointError: it has no name, is a file or a mount point, or is not empty while ``overwrite`` is off.
    """
    path, real = Path(folder), _resolved(folder)
    if path.exists() and not path.is_dir():
        raise CheckpointError(f"{path} is a file; expected a new or empty folder: choose another name")
    if os.path.ismount(real):  # of "." the parent would be itself
        raise CheckpointError(f"{path} is a mount point, which a finished folder cannot replace; name one inside it")
    if path.exists() and any(path.iterdir()) and not overwrite:
        raise CheckpointError(
            f"{path} already exists and is not empty; choose another folder, or replace it with --overwrite "
            "(overwrite=True in Python)"
        )


def check_spared(folder: str | Path, source: str | Path, what: str) -> None:
    """Raises CheckpointError where ``folder`` would take the place of a file or folder that exists and is read."""
    if not Path(source).exists():
        return
    given, target = Path(source).resolve(), _resolved(folder)
    if given == target or target in given.parents:
        raise CheckpointError(f"{folder} is or holds {what} {source}, which would be lost; choose another folder")


def _resolved(folder: str | Path) -> Path:
    """Where a folder's name leads to. An empty one, as of an unset variable, would mean the current folder."""
    if not str(folder):
        raise CheckpointError("the name of the folder to write is empty; pass one, or . for the current folder")
    try:
        path = Path(folder).resolve()
    except (OSError, RuntimeError):
        path = Path(folder)
    if path.is_symlink():
        raise CheckpointError(f"{folder} is a symbolic link that leads nowhere; remove it, or choose another folder")
    return path


@contextmanager
def atomic_folder(folder: str | Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield a temporary folder beside ``folder`` that takes its place on success and vanishes on any exception.

    Without ``overwrite``, what comes to be at ``folder`` in the meantime stays, and the finished folder lies beside it.

    Raises:
        CheckpointError: as :func:`check_output`; another run writes this folder; its parent cannot be written; the disk
            is full (whatever library found out); or the finished folder could not take its place.
    """
    check_output(folder, overwrite)
    path = _resolved(folder)
    with _parents(path), _only_run(path) as alone:
        if alone:
            clear_leftovers(path)
            check_output(folder, overwrite)  # of which the folder itself may be one
        else:
            _name_leftovers(path)
        beside = _made_beside(path)
        finished = False
        try:
            yield beside
            _settle(beside)
            _follow_mode(beside, path)
            finished = True
        except Exception as error:
            if _is_full(error):
                raise _full(path, error) from None
            raise
        finally:
            if not finished:
                shutil.rmtree(beside, ignore_errors=True)
        _put_in_place(beside, path, overwrite)


def follow_umask(path: Path) -> None:
    """Give a file or folder the permissions that a plain ``open`` or ``mkdir`` would."""
    mask = os.umask(0)
    os.umask(mask)
    path.chmod((0o777 if path.is_dir() else 0o666) & ~mask)


def clear_leftovers(path: Path) -> None:
    """Put back or remove what a killed run left beside ``path``, and say so; the caller holds its lock."""
    for old in _siblings(path, "replaced"):
        if not os.path.lexists(path):
            os.rename(old, path)
            logger.warning("a run was killed while it replaced %s; the old folder was put back", path)
        elif old.with_suffix(".partial").exists():  # it was killed before, and this is not its result
            aside = _set_aside(old, path)
            logger.warning("a run was killed while it replaced %s; the old folder is now %s", path, aside)
        else:
            shutil.rmtree(old, ignore_errors=True)
            logger.warning("removed %s, which a killed run had replaced", old)
    for half in _siblings(path, "partial"):
        shutil.rmtree(half, ignore_errors=True)
        logger.warning("removed %s, which a killed run left", half)


def _name_leftovers(path: Path) -> None:
    """Without locks nobody knows whether the run that moved a folder aside still lives."""
    if not os.path.lexists(path):
        for old in _siblings(path, "replaced"):
            logger.warning("unless another run is just replacing %s, it was moved to %s; move it back", path, old)


def _siblings(path: Path, kind: str) -> list[Path]:
    """Folders beside ``path`` that a run for it made, the newest first."""
    pattern = re.compile(rf"\.{re.escape(path.name)}\.[a-z0-9_]{{8}}\.{kind}")
    try:
        found = [entry for entry in path.parent.iterdir() if pattern.fullmatch(entry.name)]
    except PermissionError:  # a folder that can be written, but not listed
        return []
    folders = [entry for entry in found if entry.is_dir() and not entry.is_symlink()]
    return sorted(folders, key=lambda entry: -entry.stat().st_mtime)


@contextmanager
def _parents(path: Path) -> Iterator[None]:
    """The folders above ``path``; those that were made for it and are empty in the end go again."""
    made = [parent for parent in path.parents if not parent.exists()]
    try:
        with _writable(path):
            path.parent.mkdir(parents=True, exist_ok=True)
        yield
    finally:
        for parent in made:  # from the inside out
            with suppress(OSError):
                parent.rmdir()


@contextmanager
def _only_run(path: Path) -> Iterator[bool]:
    """Keep other runs away from ``path`` -> whether they are: some network file systems have no locks."""
    try:
        with _writable(path):
            held = claim(path.with_name(f".{path.name}.lock"))
    except BlockingIOError:
        raise CheckpointError(
            f"another run is writing {path}; wait until it has ended, or choose another folder"
        ) from None
    try:
        yield held.locked
    finally:
        held.close(remove=True)


def _made_beside(path: Path) -> Path:
    with _writable(path):
        return Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    """Say of which folder an OSError is."""
    try:
        yield
    except BlockingIOError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            raise _full(path, error) from None
        raise CheckpointError(f"{path.parent} cannot be written ({error.strerror}); choose another folder") from None


def _is_full(error: Exception) -> bool:
    """Whether the disk is; libraries written in Rust say so in a SafetensorError or a bare Exception."""
    return getattr(error, "errno", None) in _FULL or any(words in str(error) for words in _FULL_WORDS)


def _full(path: Path, error: Exception) -> CheckpointError:
    where, named = path.parent, getattr(error, "filename", None)
    if isinstance(named, str | bytes) and where not in Path(os.fsdecode(named)).parents:
        where = Path(os.fsdecode(named)).parent
    return CheckpointError(f"no space left on the disk of {where}; nothing was written to {path}: free some")


def _settle(folder: Path) -> None:
    """Give everything in ``folder`` plain permissions, and wait until it is on the disk."""
    entries = [folder, *folder.rglob("*")]
    for entry in entries:  # made private by mkdtemp, and files by some versions of safetensors
        follow_umask(entry)
    for entry in reversed(entries):
        _sync(entry)


def _follow_mode(beside: Path, path: Path) -> None:
    """Who may read a folder that is replaced may read the new one, and nobody else."""
    if path.is_dir():
        beside.chmod(stat.S_IMODE(path.stat().st_mode) | 0o700)


def _sync(path: Path) -> None:
    if path.is_dir() and os.name == "nt":  # which has no way to
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):  # file systems that cannot
            raise
    finally:
        os.close(descriptor)


def _put_in_place(beside: Path, path: Path, overwrite: bool) -> None:
    """Let the finished folder take its place. Where it cannot, it is kept, and the error says where.

    Raises:
        CheckpointError: without ``overwrite`` something is there now, or the system refuses.
    """
    kept = None
    try:
        _replace(beside, path, overwrite)
        with suppress(OSError):
            _sync(path.parent)  # before the old folder, which now lies beside, is removed
    except OSError as error:
        why = f"could not be put in place ({error.strerror})"
        if error.errno in _TAKEN:
            why = "appeared while this run was working and was left as it is"
        kept = _set_aside(beside, path)
        raise CheckpointError(f"{path} {why}; the finished checkpoint is in {kept}") from None
    finally:
        if kept != beside:
            shutil.rmtree(beside, ignore_errors=True)


def _replace(beside: Path, path: Path, overwrite: bool) -> None:
    """Move ``beside`` to ``path``; a folder that was there lies at ``beside`` afterwards.

    A rename onto a file, or onto a folder that holds something, fails (POSIX); only an empty one gives way. So it needs
    no look before, which another process could outdate.
    """
    for attempt in itertools.count():
        if os.name == "nt":  # where a rename never replaces a folder
            with suppress(OSError):
                path.rmdir()
        try:
            beside.rename(path)
            return
        except OSError as error:
            if not overwrite or error.errno not in _TAKEN or path.is_symlink() or not path.is_dir() or attempt == 3:
                raise
        with suppress(FileNotFoundError):  # it went away: rename again
            if not exchange(beside, path):
                _replace_in_two_steps(beside, path)
            return


def _replace_in_two_steps(beside: Path, path: Path) -> None:
    """As :func:`exchange`, with a moment in between at which ``path`` does not exist."""
    old = beside.with_suffix(".replaced")
    try:
        path.rename(old)
        beside.rename(path)
        old.rename(beside)
    finally:
        if old.exists() and not os.path.lexists(path):
            old.rename(path)
        elif old.exists() and not beside.exists():
            old.rename(beside)


def exchange(one: Path, other: Path) -> bool:
    """Swap two names in one step -> False where the system or the file system cannot.

    Raises:
        OSError: it can, but not these two.
    """
    if (rename := _renameat2()) is None:
        return False
    here, swap = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    if rename(here, os.fsencode(one), here, os.fsencode(other), swap) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP, errno.EPERM):  # EPERM: old sandboxes that do not know it
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


@cache
def _renameat2() -> Callable[[int, bytes, int, bytes, int], int] | None:
    """Of the C library of Linux, where it is new enough."""
    if sys.platform != "linux":
        return None
    function = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if function is not None:
        function.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    return function


def _set_aside(beside: Path, path: Path) -> Path:
    """Give the finished folder a plain name that is free: no later run takes it for a leftover -> where it is."""
    for number in itertools.count(2):
        spare = path.with_name(f"{path.name}-{number}")
        if os.path.lexists(spare):
            continue
        try:
            beside.rename(spare)
        except OSError as error:
            if error.errno in _TAKEN:
                continue
            return beside
        return spare
    raise AssertionError("unreachable")
