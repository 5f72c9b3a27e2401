"""How the device sources become machine code: by NVRTC, the compiler that every CUDA build of torch brings.

It needs no GPU, no header and no other compiler. Nothing but the standard library is imported here, because the wheel
of machine code is built with this file alone.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

SOURCES = Path(__file__).parent / "device"
OPTIONS = ("--std=c++17",)


class CompileError(RuntimeError):
    """There is no compiler, or it failed."""


class Compiler:
    """One NVRTC library.

    Args:
        path: of ``libnvrtc.so.*``, or its name alone where the system's loader finds it.

    Attributes:
        version: of CUDA, e.g. (12, 9). architectures: e.g. 90 for compute capability 9.0, ascending.

    Raises:
        CompileError: it cannot be loaded.
    """

    def __init__(self, path: str) -> None:
        try:
            if os.path.dirname(path):  # the library does not find its second half in the folders of NVIDIA's packages
                for builtins in Path(path).parent.glob("libnvrtc-builtins.so.*"):
                    ctypes.CDLL(str(builtins))
            self._library = ctypes.CDLL(path)
            self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        except (OSError, AttributeError) as error:
            raise CompileError(f"NVRTC cannot be loaded ({error})") from None
        major, minor, count = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
        self._call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = major.value, minor.value
        self._call("nvrtcGetNumSupportedArchs", ctypes.byref(count))
        found = (ctypes.c_int * count.value)()
        self._call("nvrtcGetSupportedArchs", found)
        self.architectures = sorted(found)

    def __str__(self) -> str:
        return f"NVRTC {self.version[0]}.{self.version[1]}"

    def compile(self, bits: int, target: str) -> bytes:
        """All kernels for codes of ``bits`` bits.

        Args:
            target: "sm_90" for the machine code of an architecture, "compute_90" for PTX.

        Raises:
            CompileError: with the end of the compiler's log.
        """
        headers = [path for path in source_files() if path.suffix != ".cu"]
        texts = (ctypes.c_char_p * len(headers))(*(path.read_bytes() for path in headers))
        names = (ctypes.c_char_p * len(headers))(*(path.name.encode() for path in headers))
        main = SOURCES / "kernels.cu"
        program = ctypes.c_void_p()
        source = main.read_bytes(), main.name.encode()
        self._call("nvrtcCreateProgram", ctypes.byref(program), *source, len(headers), texts, names)
        try:
            options = [each.encode() for each in (*OPTIONS, f"--gpu-architecture={target}", f"-DGPTQ_BITS={bits}")]
            arguments = (ctypes.c_char_p * len(options))(*options)
            if self._library.nvrtcCompileProgram(program, len(options), arguments):
                log = self._read(program, "ProgramLog").rstrip(b"\0").decode(errors="replace")
                raise CompileError(f"{self} cannot compile the CUDA kernels for {target}: {log[-2000:]}")
            return self._read(program, "CUBIN" if target.startswith("sm") else "PTX")
        finally:
            self._call("nvrtcDestroyProgram", ctypes.byref(program))

    def _read(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self._call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def _call(self, function: str, *arguments: object) -> None:
        try:
            called = getattr(self._library, function)
        except AttributeError:
            raise CompileError(f"NVRTC has no {function}; install the one of CUDA 11.2 or newer") from None
        if status := called(*arguments):
            text = self._library.nvrtcGetErrorString(status)
            raise CompileError(f"{function} failed with {status}: {text.decode() if text else 'an unknown error'}")


def find_compiler(cuda: str | None = None) -> Compiler:
    """The NVRTC of torch, of NVIDIA's packages on the path of Python, or of the system.

    Args:
        cuda: the version of CUDA that it must be of, e.g. ``torch.version.cuda``; only the part before the first dot
            counts, since two of one process should be one.

    Raises:
        CompileError: there is none.
    """
    major = (cuda or "").partition(".")[0]
    for candidate in _candidates(major):
        try:
            found = Compiler(candidate)
        except CompileError:
            continue
        if not major or str(found.version[0]) == major:
            return found
    name = f"libnvrtc.so.{major}" if major else "libnvrtc.so"
    package = f"nvidia-cuda-nvrtc-cu{major}" if major in ("11", "12") else "nvidia-cuda-nvrtc"
    raise CompileError(f"no {name} was found; torch's CUDA builds bring it, and so does the package {package}")


def _candidates(major: str) -> Iterator[str]:
    # Some of torch's wheels, above all for ARM, have CUDA's libraries inside. Others need NVIDIA's packages:
    # nvidia/cuda_nvrtc/lib up to CUDA 12, nvidia/cu13/lib later. Then those of conda and of a toolkit.
    folders = [package / "lib" for package in _package_folders("torch")]
    folders += [folder for package in _package_folders("nvidia") for folder in package.glob("*/lib")]
    folders += [Path(sys.prefix) / "lib", Path(os.environ.get("CUDA_HOME") or "/usr/local/cuda") / "lib64"]
    for folder in folders:
        yield from sorted((str(path) for path in folder.glob(f"libnvrtc.so.{major}*")), reverse=True)
    yield f"libnvrtc.so.{major}" if major else "libnvrtc.so"  # where the system's loader finds it


def _package_folders(name: str) -> list[Path]:
    spec = importlib.util.find_spec(name)
    return [Path(folder) for folder in spec.submodule_search_locations or ()] if spec else []


def serving(capability: int, architectures: Iterable[int]) -> int | None:
    """The architecture whose machine code runs best on a device: of the same major version, and not above it.

    Both are numbers like 86 for compute capability 8.6.
    """
    fit = [each for each in architectures if each // 10 == capability // 10 and each <= capability]
    return max(fit, default=None)


def source_files() -> list[Path]:
    """The device sources, in one order."""
    return sorted(path for path in SOURCES.iterdir() if path.suffix in (".h", ".cuh", ".cu"))


def source_hash() -> str:
    """Of the device sources and the options that they are compiled with."""
    found = hashlib.sha256(" ".join(OPTIONS).encode())
    for path in source_files():
        found.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()
