"""The CUDA kernels on the host, behind a stand-in for NVIDIA's driver: the extension is used as it is installed."""

from __future__ import annotations

import ctypes
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from gptq_backend.kernels.cuda import loading, nvrtc

SOURCES = Path(__file__).parent / "cuda_emulator"


class Emulator:
    """The stand-in (cuda_emulator/driver.cpp), with the kernels of every width.

    Args:
        compiler: for C++.
        folder: to compile into.
    """

    def __init__(self, compiler: str, folder: Path) -> None:
        command = [compiler, "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
        command += [f"-I{path}" for path in (nvrtc.SOURCES, SOURCES)]

        def compile_one(name: str, *arguments: str) -> str:
            done = str(folder / name)
            subprocess.run([*command, "-x", "c++", *arguments, "-c", "-o", done], check=True)
            return done

        widths = [(f"{bits}.o", str(nvrtc.SOURCES / "kernels.cu"), f"-DGPTQ_BITS={bits}") for bits in (2, 3, 4, 8)]
        with ThreadPoolExecutor(2) as pool:
            objects = list(
                pool.map(lambda job: compile_one(*job), [("driver.o", str(SOURCES / "driver.cpp")), *widths])
            )
        self.path = folder / "libcuda.so.1"
        subprocess.run([compiler, "-shared", *objects, "-o", str(self.path)], check=True)
        self._library = ctypes.CDLL(str(self.path))
        for function in ("emulator_calls", "emulator_kernels"):
            getattr(self._library, function).restype = ctypes.c_char_p

    def seed(self, seed: int) -> None:
        """Choose the order of warps, and when asynchronous copies land."""
        self._library.emulator_seed(ctypes.c_uint64(seed))

    def start(self, capability: int = 80) -> None:
        """Be a new driver, with devices of this compute capability, and let the extension use it."""
        self._library.emulator_reset(capability)
        loading.extension.open_driver(str(self.path))
        loading.unfit.cache_clear()

    def fail(self, function: str, status: int) -> None:
        """Let a function of the driver return an error from now on."""
        self._library.emulator_fail(function.encode(), status)

    def forget_kernel(self, name: str) -> None:
        """Let modules have no kernel of this name."""
        self._library.emulator_forget_kernel(name.encode())

    @property
    def calls(self) -> list[str]:
        """What was called since the start, most with what for."""
        return self._library.emulator_calls().decode().splitlines()

    @property
    def kernels(self) -> dict[str, list[int]]:
        """By name, the bytes of each argument."""
        lines = [line.split() for line in self._library.emulator_kernels().decode().splitlines()]
        return {name: [int(size) for size in sizes] for name, *sizes in lines}
