"""What a run was measured on, and what the hardware allows: the read bandwidth and the rate of dense products."""

from __future__ import annotations

import datetime
import functools
import importlib
import os
import platform
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..version import __version__
from .timing import synchronize, threads

_CPUS = Path("/sys/devices/system/cpu")
_FALLBACK_CACHE = 32 << 20
_MIN_STREAMED = 512 << 20
_GPU_STREAMED = 4 << 30  # read in about a millisecond, beside which a launch is short
_MAX_SQUARE = 8192  # largest matrix to multiply
# Of the dozens of flags, those that kernels choose by (x86, then ARM).
_ISA = {
    *("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512_vbmi", "avx512_vnni", "avx512_bf16"),
    *("avx512_fp16", "avx_vnni", "amx_tile", "amx_bf16", "amx_int8"),
    *("asimd", "asimddp", "asimdhp", "bf16", "i8mm", "sve", "sve2"),
}
_ENVIRONMENT = ("OMP_", "KMP_", "GOMP_", "MKL_", "ONEDNN_", "GPTQ_BACKEND_", "LD_PRELOAD")


def describe_machine(device: torch.device, command: str) -> dict[str, Any]:
    """Hardware, versions and settings that the figures depend on, as JSON values."""
    info = _cpu_info()
    return {
        "device": str(device),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "isa": sorted(_ISA.intersection((info.get("flags") or info.get("Features") or "").split())),
        "isa_torch": torch.backends.cpu.get_cpu_capability(),
        "isa_native": None if (native := _native()) is None else native.level(),
        "last_level_cache_bytes": last_level_cache(),
        "load_average": os.getloadavg()[0] if hasattr(os, "getloadavg") else None,
        "system": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gptq_backend": __version__,
        "git_commit": _git_commit(),
        "environment": {key: value for key, value in sorted(os.environ.items()) if key.startswith(_ENVIRONMENT)},
        "command": command,
        "time": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
    }


def _cpu_info() -> dict[str, str]:
    """The first processor of Linux's /proc/cpuinfo; empty elsewhere."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return {}
    pairs = (line.partition(":") for line in text.partition("\n\n")[0].splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


@functools.cache
def last_level_cache() -> int:
    """Bytes of all last-level caches together; a common size where the system does not tell."""
    largest: dict[str, tuple[int, int]] = {}  # CPUs that share it -> level, bytes
    for index in _CPUS.glob("cpu[0-9]*/cache/index[0-9]*"):
        try:
            level, size = int((index / "level").read_text()), (index / "size").read_text().strip()
            shared = (index / "shared_cpu_list").read_text().strip()
        except OSError:
            continue
        largest[shared] = max(largest.get(shared, (0, 0)), (level, int(size.rstrip("K")) << 10))
    last = max((level for level, _ in largest.values()), default=0)
    return sum(size for level, size in largest.values() if level == last) or _FALLBACK_CACHE


def _git_commit() -> str | None:
    """Of the working tree that the package lies in, with "+" if tracked files differ from it; None if in none."""
    package = Path(__file__).parents[1]

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        git("ls-files", "--error-unmatch", "__init__.py")  # an installed copy may lie inside a stranger's repository
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def measure_ceilings(device: torch.device) -> dict[str, Any]:
    """Read bandwidth in GB/s, with all threads and (CPU) with one, and dense products in GFLOP/s."""
    read = read_gbps(device)
    ceilings: dict[str, Any] = {"read_gbps": max(read.values()), "read_gbps_by_reader": read}
    if device.type == "cpu":
        with threads(1):
            one = read_gbps(device)
        ceilings |= {"read_gbps_1_thread": max(one.values()), "read_gbps_1_thread_by_reader": one}
    products = {str(dtype)[6:]: _product_rate(device, dtype) for dtype in (torch.float32, torch.bfloat16)}
    peak = max(products, key=products.__getitem__)
    return ceilings | {"matmul_gflops": products, "peak_gflops": products[peak], "peak_from": f"torch.mm {peak}"}


def read_gbps(device: torch.device) -> dict[str, float]:
    """GB/s of each reader, best of several passes over a buffer far larger than the caches."""
    # Written to: memory that never was is one page of zeros, which comes from the cache.
    size = max(_MIN_STREAMED, 8 * last_level_cache()) if device.type == "cpu" else _GPU_STREAMED
    buffer = torch.ones(size // 4, device=device)
    return {name: buffer.nbytes / _best(reader, buffer) / 1e9 for name, reader in _readers(device).items()}


def _readers(device: torch.device) -> dict[str, Callable[[Tensor], object]]:
    """Ways to read a float32 buffer once. No one of them is fastest everywhere; the best is the ceiling."""
    readers: dict[str, Callable[[Tensor], object]] = {
        "sum float32": torch.sum,
        "sum int64": lambda buffer: buffer.view(torch.int64).sum(),
        "mv float32": lambda buffer: torch.mv(buffer.view(-1, 4096), buffer[:4096]),
    }
    if device.type == "cpu" and _native() is not None:
        readers["native"] = read_once
    return readers


def read_once(buffer: Tensor) -> None:
    """Read a CPU tensor with the native reader, on torch's number of threads.

    Raises:
        ImportError: the native extension was not built.
    """
    native = importlib.import_module("gptq_backend._cpu")
    native.read_bandwidth(buffer.data_ptr(), buffer.nbytes, 1, torch.get_num_threads())


def _native() -> Any:
    """The native extension, None where it was not built."""
    try:
        return importlib.import_module("gptq_backend._cpu")
    except ImportError:
        return None


def _best(reader: Callable[[Tensor], object], buffer: Tensor, repeats: int = 8) -> float:
    """Seconds of the fastest call."""
    times = []
    for _ in range(repeats):
        synchronize(buffer.device)
        start = time.perf_counter()
        reader(buffer)
        synchronize(buffer.device)
        times.append(time.perf_counter() - start)
    return min(times)


def _product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """GFLOP/s of torch.mm: growing sizes, until one takes long (a CPU without 16-bit units may need minutes)."""
    rate, size = 0.0, 128
    while size <= _MAX_SQUARE:
        square = torch.randn((size, size), device=device).to(dtype)
        seconds = _best(lambda matrix: matrix @ matrix, square, repeats=3)
        rate = max(rate, 2 * size**3 / seconds / 1e9)
        if seconds > 0.1:
            break
        size *= 2
    return rate
