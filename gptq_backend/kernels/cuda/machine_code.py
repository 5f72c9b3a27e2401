"""Where the machine code for a device comes from: the package gptq-backend-cuda, or NVRTC and its results on disk."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import os
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch

from .nvrtc import CompileError, Compiler, find_compiler, serving, source_hash

logger = logging.getLogger(__name__)

_PACKAGE = "gptq_backend_cuda"  # of the distribution gptq-backend-cuda
OLDEST = 75  # the matrix instructions that the kernels use came with compute capability 7.5


class Image(NamedTuple):
    """Machine code that may serve.

    Args:
        origin: what it is, for messages.
        get: gives it for the driver; CompileError or OSError when it cannot.
    """

    origin: str
    get: Callable[[], bytes]


def images(bits: int, capability: int) -> Iterator[Image]:
    """What may serve a device, the best first, for codes of ``bits`` bits.

    Args:
        capability: 10 * major + minor of its compute capability.
    """
    shipped = _shipped()
    arch = serving(capability, shipped.cubins)
    if arch is not None:
        yield Image(f"sm_{arch} of gptq-backend-cuda", lambda: shipped.read(f"sm_{arch}", bits))
    yield Image("machine code by NVRTC", lambda: _compiled(bits, capability))
    if shipped.ptx is not None and shipped.ptx <= capability:
        # The driver compiles it, in seconds, and keeps what it made.
        origin = f"PTX of gptq-backend-cuda, which needs the driver of CUDA {shipped.cuda} or a newer one"
        yield Image(origin, lambda: shipped.read(f"compute_{shipped.ptx}", bits))


# -- the package -------------------------------------------------------------------------------------------------------


class Shipped(NamedTuple):
    """What gptq-backend-cuda has.

    Args:
        folder: of the files ``sm_ARCHITECTURE-BITS.xz`` and ``compute_ARCHITECTURE-BITS.xz``.
        cuda: version of the CUDA compiler.
        cubins: architectures with machine code.
        ptx: the architecture of the PTX.
    """

    folder: Path
    cuda: str = ""
    cubins: tuple[int, ...] = ()
    ptx: int | None = None

    def read(self, target: str, bits: int) -> bytes:
        """The code for ``target``, e.g. "sm_90". OSError: the file is missing or damaged."""
        packed = (self.folder / f"{target}-{bits}.xz").read_bytes()
        try:
            import lzma

            return lzma.decompress(packed)
        except ImportError:
            raise OSError("this Python was built without lzma") from None
        except lzma.LZMAError as error:
            raise OSError(f"{target}-{bits}.xz is damaged: {error}") from None


@functools.cache
def _shipped() -> Shipped:
    """The installed package, if it was made of the sources that are installed here; else one without files."""
    spec = importlib.util.find_spec(_PACKAGE)
    if spec is None or spec.origin is None:
        return Shipped(Path())
    folder = Path(spec.origin).parent
    try:
        contents = json.loads((folder / "contents.json").read_text(encoding="utf-8"))
        found = Shipped(folder, contents["cuda"], tuple(contents["cubins"]), contents["ptx"])
        sources = contents["sources"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        logger.warning("the package gptq-backend-cuda is damaged (%s); install it again", error)
        return Shipped(Path())
    if sources != source_hash():
        logger.warning(
            "the package gptq-backend-cuda is of another version than gptq-backend and is not used; install the same "
            "version of both"
        )
        return Shipped(Path())
    return found


# -- NVRTC -------------------------------------------------------------------------------------------------------------


def _compiled(bits: int, capability: int) -> bytes:
    """Machine code by NVRTC, from the cache where it is there."""
    compiler = _compiler()
    arch = serving(capability, compiler.architectures)
    if arch is None:
        raise CompileError(f"{compiler} knows no architecture of compute capability {capability // 10}")
    key = hashlib.sha256(f"{source_hash()} {compiler} sm_{arch} {bits}".encode()).hexdigest()[:24]
    path = cache_folder() / f"sm_{arch}-{bits}-{key}.cubin"
    if (kept := _read(path)) is not None:
        return kept
    logger.warning(
        "compiling the CUDA kernels for %d bits and compute capability %d.%d with %s, once, for about ten seconds; the "
        "package gptq-backend-cuda has them compiled",
        bits, *divmod(capability, 10), compiler,
    )  # fmt: skip
    code = compiler.compile(bits, f"sm_{arch}")
    _keep(path, code)
    return code


@functools.cache
def _compiler() -> Compiler:
    return find_compiler(torch.version.cuda)


def cache_folder() -> Path:
    """Where compiled kernels are kept; a relative path if the user has no home."""
    root = os.environ.get("XDG_CACHE_HOME", "")
    if not os.path.isabs(root):  # which its specification says to ignore
        root = os.path.join(os.path.expanduser("~"), ".cache")
    return Path(root) / "gptq_backend" / "cuda"


def _read(path: Path) -> bytes | None:
    """What :func:`_keep` wrote; None where there is nothing, it is damaged, or another user could have written it."""
    try:
        with open(path, "rb") as file:
            status = os.fstat(file.fileno())
            if status.st_uid != os.getuid() or status.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
                return None
            digest, code = file.read(32), file.read()
    except OSError:
        return None
    return code if hashlib.sha256(code).digest() == digest else None


def _keep(path: Path, code: bytes) -> None:
    """Write a file for later processes, whole or not at all."""
    try:
        if not path.is_absolute():
            raise OSError("this user has no home folder; set XDG_CACHE_HOME to a folder for them")
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        descriptor, partial = tempfile.mkstemp(dir=path.parent)  # 0600
        try:
            with open(descriptor, "wb") as file:
                file.write(hashlib.sha256(code).digest() + code)
            os.replace(partial, path)
        except BaseException:
            with suppress(OSError):
                os.unlink(partial)
            raise
    except OSError as error:
        logger.warning("the compiled CUDA kernels cannot be kept for the next process (%s)", error)
