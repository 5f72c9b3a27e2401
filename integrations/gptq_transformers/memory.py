"""How much memory a whole model takes, and how much is free."""

from __future__ import annotations

import sys
from pathlib import Path

import psutil
import torch
from torch import nn

_CGROUPS = Path("/sys/fs/cgroup")


def bytes_of(model: nn.Module, dtype: torch.dtype) -> int:
    """Bytes of all parameters in ``dtype``; ``model`` may be on the meta device."""
    return sum(parameter.numel() for parameter in model.parameters()) * dtype.itemsize


def free_bytes(device: torch.device) -> int:
    """What can still be allocated on ``device``; on a CPU also a container's limit counts."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    available = psutil.virtual_memory().available
    return min([available, *_left_in_containers()]) if sys.platform == "linux" else available


def used_bytes() -> tuple[int, int]:
    """What this process holds of the machine's memory now, and the most that it has held."""
    info = psutil.Process().memory_info()
    if sys.platform == "win32":
        return info.rss, info.peak_wset
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return info.rss, max(peak, info.rss)


def _left_in_containers(root: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> list[int]:
    """Bytes left below the memory limit of this process's control group (version 2) and of those around it."""
    left: list[int] = []
    try:
        own = next(line[3:] for line in membership.read_text().splitlines() if line.startswith("0::"))
    except (OSError, StopIteration):
        return left
    folder = root / own.strip("/")
    for group in (folder, *folder.parents):
        try:
            limit, used = (group / "memory.max").read_text().strip(), int((group / "memory.current").read_text())
            counts = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):
            limit = "max"
        if limit != "max":
            left.append(max(0, int(limit) - used + int(counts.get("inactive_file", 0))))  # the cache gives way
        if group == root:
            break
    return left
