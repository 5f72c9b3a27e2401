"""Rounds a weight to the nearest codes, group by group: for layers where no inputs are known."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import QuantizeConfig
from ..format.weight import QuantizedWeight
from .grid import SCALE_DTYPE
from .scale_search import fit_grid

_ELEMENTS = 1 << 16  # that are rounded at once: what a core's cache holds


def round_to_nearest(weight: Tensor, config: QuantizeConfig) -> QuantizedWeight:
    """Round ``weight`` in float32, under the grids that cost each group the least squared error.

    Args:
        weight: float [N, K].
        config: bits, group_size, sym and scale_search.
    """
    (outputs, channels), size = weight.shape, config.group_size
    size = channels if size == -1 else min(size, channels)
    if channels % size:  # zeros, which every grid has, cost the last group nothing
        weight = torch.nn.functional.pad(weight, (0, -channels % size))
    inputs = weight.shape[1]
    price = torch.ones(size, device=weight.device)
    codes = torch.empty(outputs, inputs, dtype=torch.uint8, device=weight.device)
    scales: list[Tensor] = []
    zeros: list[Tensor] = []
    for part, into in zip(*(each.split(max(1, _ELEMENTS // inputs)) for each in (weight, codes))):
        columns = part.float().reshape(-1, size).t().contiguous()  # [size, rows * groups]
        grid = fit_grid(columns, price, config)
        centred, error = torch.empty_like(columns), torch.empty_like(columns)
        grid.round(columns, centred, error)
        into.copy_((centred + grid.zero).t().reshape(into.shape))
        scales.append(grid.scale.to(SCALE_DTYPE).view(len(part), -1))
        zeros.append(grid.zero.to(torch.uint8).view(len(part), -1))
    groups = torch.arange(channels, dtype=torch.int32, device=weight.device) // size
    by_input = (
        codes[:, :channels].t().contiguous(),
        torch.cat(scales).t().contiguous(),
        torch.cat(zeros).t().contiguous(),
    )
    return QuantizedWeight(*by_input, groups, config.bits)
