"""Which activation a function computes, found by trying."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

_KNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu_squared": lambda x: nn.functional.relu(x).square(),
}


def name_of(function: Callable[[Tensor], Tensor]) -> str | None:
    """Its name in ``gptq_backend.kernels.cpu_block.ACTIVATIONS``, or None. function: float [1, N] -> [1, N]."""
    return gated_name_of(lambda gate, up: function(gate) * up)


def gated_name_of(function: Callable[[Tensor, Tensor], Tensor]) -> str | None:
    """The name of f where ``function(gate, up)`` is ``f(gate) * up``, or None; function: float [1, N] twice -> [1, N].

    One that fails, because it expects other shapes for example, has none.
    """
    gate = torch.linspace(-60, 60, 1921, dtype=torch.float32, device="cpu")
    # Far enough to see where somebody cuts off.
    large = torch.tensor([1e2, 1e3, 1e4], dtype=torch.float32, device="cpu")
    gate = torch.cat([gate, large, -large])[None]
    up = gate.roll(777)
    try:
        found = function(gate, up)
        for name, known in _KNOWN.items():
            if found.shape == gate.shape and torch.allclose(found, known(gate) * up, rtol=1e-6, atol=1e-7):
                return name
    except Exception:
        return None
    return None
