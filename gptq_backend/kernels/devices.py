"""What kernels need to know of dtypes and devices."""

from __future__ import annotations

import contextlib
from typing import Any

import torch

# As csrc/ numbers the dtypes of activations, scales and biases.
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def on_device(device: torch.device) -> Any:
    """Triton launches on the current device: make ``device`` it."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)
