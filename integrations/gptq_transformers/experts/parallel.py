"""Linear layers of all experts in one 3-D weight, as JetMoE and Granite have them, and the list that replaces them."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn


class ParallelLinears(nn.ModuleList):
    """A linear layer for each expert, called as the module that it replaces: with rows sorted by expert."""

    fused_names = ("weight",)  # parameters of the module that the layers stand for

    def forward(self, inputs: Tensor, expert_size: Sequence[int]) -> Tensor:
        """inputs [T, K], of which expert i reads the next ``expert_size[i]`` rows -> [T, N]."""
        parts = inputs.split(list(expert_size), 0)
        return torch.cat([layer(part) for layer, part in zip(self, parts, strict=True) if len(part)])


_computing: dict[tuple[Any, ...], bool] = {}


def is_parallel(module: nn.Module) -> bool:
    """Whether the module multiplies sorted rows by a weight [E, N, K]; that is tried on random numbers."""
    weight = module._parameters.get("weight")
    if list(module._parameters) != ["weight"] or weight is None or weight.dim() != 3:
        return False
    key = (type(module), weight.shape)
    if key not in _computing:
        generator = torch.Generator().manual_seed(0)
        count, _, width = weight.shape
        one = torch.randn(1, *weight.shape[1:], generator=generator, device="cpu")
        x = torch.randn(count, width, generator=generator, device="cpu")
        trial = copy.copy(module)
        trial.__dict__["_parameters"] = {"weight": one.expand(count, -1, -1)}
        try:
            with torch.no_grad(), torch.device("cpu"):
                found = type(module).forward(trial, x, [1] * count)
            _computing[key] = torch.allclose(found, x @ one[0].t(), rtol=1e-3, atol=1e-3)
        except Exception:  # whatever the code of a model raises for what it was not made for
            _computing[key] = False
    return _computing[key]
