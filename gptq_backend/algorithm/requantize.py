"""Rounds a quantized weight that was changed, for example by an adapter: under its old grid, where that is better.

A weight that was dequantized lies on its grid. A new grid would cost it a whole rounding error, the old one only what
the change is off the grid, and nothing where nothing changed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import QuantizeConfig
from ..format.weight import QuantizedWeight
from .grid import SCALE_DTYPE, Grid
from .scale_search import fit_grid


@torch.no_grad()
def round_changed(weight: Tensor, before: QuantizedWeight, config: QuantizeConfig) -> QuantizedWeight:
    """Round ``weight`` to nearest, each group of an output channel under its old grid or a new one, by squared error.

    Args:
        weight: float [N, K].
        before: what the weight was, with the same shape and bits.
        config: sym and the search of scales, for new grids.

    Returns:
        A weight in the groups of ``before``.
    """
    index = before.g_idx.long()
    columns = weight.t().to(torch.promote_types(weight.dtype, torch.float32))  # [K, N]
    dtype = torch.promote_types(before.scales.dtype, SCALE_DTYPE)
    codes, scales, zeros = torch.empty_like(before.codes), before.scales.to(dtype, copy=True), before.zeros.clone()
    for group in index.unique().tolist():
        inside = (index == group).nonzero().flatten()
        values = columns[inside].contiguous()
        zero = before.zeros[group].to(values.dtype)
        old = Grid(before.scales[group].to(values.dtype), zero, -zero, (1 << before.bits) - 1 - zero)
        new = fit_grid(values, torch.ones_like(values[:, 0]), config)
        (kept, kept_error), (refit, refit_error) = _rounded(values, old), _rounded(values, new)
        better = refit_error < kept_error
        codes[inside] = torch.where(better, refit, kept).to(torch.uint8)
        scales[group] = torch.where(better, new.scale.to(dtype), scales[group])
        zeros[group] = torch.where(better, new.zero.to(torch.uint8), zeros[group])
    return QuantizedWeight(codes, scales, zeros, before.g_idx, before.bits)


def _rounded(values: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Codes [k, N], and the squared error of each output channel [N]; infinite where the grid has a scale of 0."""
    centred, error = torch.empty_like(values), torch.empty_like(values)
    grid.round(values, centred, error)
    return centred + grid.zero, error.square().sum(0).nan_to_num_(torch.inf)
