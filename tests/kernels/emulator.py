"""The CUDA kernels on the host, behind a stand-in for NVIDIA's driver: the extension is used as it is installed."""

from __future__ import annotations

import ctypes
import subprocess
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gptq_backend.kernels.cuda import loading, nvrtc

SOURCES = Path(__file__).parent / "cuda_emulator"


def build_library(compiler: str, folder: Path, sources: Iterable[tuple[Path, str]], *options: str) -> Path:
    """Compile C++ into ``folder``/libcuda.so.1.

    Args:
        sources: files, each with one more option for the compiler ("" for none).
        options: for all files.
    """
    command = [compiler, "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror", *options]
    command += [f"-I{path}" for path in (nvrtc.SOURCES, SOURCES)]

    def compile_one(job: tuple[int, tuple[Path, str]]) -> str:
        number, (source, option) = job
        done = str(folder / f"{number}.o")
        subprocess.run([*command, *option.split(), "-x", "c++", "-c", str(source), "-o", done], check=True)
        return done

    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, enumerate(sources)))
    library = folder / "libcuda.so.1"
    subprocess.run([compiler, "-shared", *objects, "-o", str(library)], check=True)
    return library


class StandIn:
    """In place of NVIDIA's driver (cuda_emulator/driver.cpp).

    Args:
        path: the library.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.library = ctypes.CDLL(str(path))
        for function in ("emulator_calls", "emulator_kernels"):
            getattr(self.library, function).restype = ctypes.c_char_p

    def seed(self, seed: int) -> None:
        """Choose the order of warps, and when asynchronous copies land."""
        self.library.emulator_seed(ctypes.c_uint64(seed))

    def start(self, capability: int = 80) -> None:
        """Be a new driver, with devices of this compute capability, and let the extension use it."""
        self.library.emulator_reset(capability)
        loading.extension.open_driver(str(self.path))
        loading.unfit.cache_clear()

    def fail(self, function: str, status: int) -> None:
        """Let a function of the driver return an error from now on."""
        self.library.emulator_fail(function.encode(), status)

    def forget_kernel(self, name: str) -> None:
        """Let modules have no kernel of this name."""
        self.library.emulator_forget_kernel(name.encode())

    @property
    def calls(self) -> list[str]:
        """What was called since the start, most with what for."""
        return self.library.emulator_calls().decode().splitlines()

    @property
    def shared_bytes(self) -> int:
        """Of the last launch."""
        return self.library.emulator_shared_bytes()

    @property
    def kernels(self) -> dict[str, list[int]]:
        """By name, the bytes of each argument."""
        lines = [line.split() for line in self.library.emulator_kernels().decode().splitlines()]
        return {name: [int(size) for size in sizes] for name, *sizes in lines}


class Emulator(StandIn):
    """The stand-in with the kernels of every width, compiled from their sources.

    Args:
        compiler: for C++.
        folder: to compile into.
    """

    def __init__(self, compiler: str, folder: Path) -> None:
        widths = [(nvrtc.SOURCES / "kernels.cu", f"-DGPTQ_BITS={bits}") for bits in (2, 3, 4, 8)]
        super().__init__(build_library(compiler, folder, [(SOURCES / "driver.cpp", ""), *widths], "-std=c++17", "-O1"))
