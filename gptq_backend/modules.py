"""What others do to modules: functions that move or cast their tensors, and accelerate's offloading."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def effect(fn: Callable[[Tensor], Tensor], home: torch.device) -> tuple[torch.device, bool, bool]:
    """What ``fn``, as ``nn.Module._apply`` gets it, does with a tensor on ``home``.

    Returns:
        device: where its result is.
        keeps_values: False for ``to_empty()``, and on the meta device.
        shares: it puts the tensor into shared memory, in place.
    """
    # Values that no memory has held before, lest an uninitialised result happen to equal them.
    probe = torch.tensor([random.getrandbits(62), random.getrandbits(62)], device=home)
    before = probe.tolist()
    result = fn(probe)
    cast = result.dtype != probe.dtype
    keeps = not result.is_meta and (cast or result.tolist() == before)
    return result.device, keeps, probe.is_cpu and probe.is_shared()


def offloading_hook(module: nn.Module) -> Any:
    """accelerate's hook that brings the module's weights for each call and takes them away again, or None."""
    hook = getattr(module, "_hf_hook", None)
    return next((item for item in getattr(hook, "hooks", [hook]) if getattr(item, "offload", False)), None)
