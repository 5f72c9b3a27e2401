"""Find the grid of a group under which rounding costs least, by trying scales around min-max."""

from __future__ import annotations

import torch
from torch import Tensor

from ..config import QuantizeConfig
from ..timing import timed
from .columns import round_columns, rounding_costs
from .grid import Grid, min_max_grid

# Candidate scales relative to min-max: beyond 1 because a symmetric grid has one code more below zero than above.
_SHRINK = tuple(1.08 - 0.03 * i for i in range(20))
_WIDE_SHRINK = tuple(1.1 - 0.03 * i for i in range(24))  # a scale of the better sign may be smaller
_SEARCH_ROWS = 384  # output channels whose finalists are tried at once: what a core's cache holds


@timed("search")
def fit_grid(columns: Tensor, cost: Tensor, config: QuantizeConfig, spread: Tensor | None = None) -> Grid:
    """Fit a grid to a group.

    Args:
        columns: [g, N], the group's weights.
        cost: [g], price of a squared error in each column.
        config: bits, sym, and how to search: candidates around min-max are ranked per output channel by the cost of
            plain rounding; the best few are tried again with error feedback inside the group.
        spread: [g, g], what an error of one column adds to the others; None searches without feedback.
    """
    if config.sym:
        high = columns.abs().amax(dim=0)
        low = -high
    else:
        low, high = columns.amin(dim=0).clamp_(max=0), columns.amax(dim=0).clamp_(min=0)
    if not config.scale_search:
        return min_max_grid(low, high, config)
    candidates = _candidates(low, high, config)  # fields [candidates, N]
    finalists = config.preset.search_finalists if spread is not None else 1
    if finalists > 1:  # a choice among grids, each exact in float32
        columns, cost = columns.float(), cost.float()
        candidates = candidates.map(Tensor.float)
    totals = rounding_costs(columns, cost, candidates)
    if finalists > 1 and spread is not None:
        best = totals.sort(dim=0, stable=True).indices[:finalists]
        candidates = candidates.map(lambda field: field.gather(0, best))
        totals = _cost_with_feedback(columns, cost, spread.float(), candidates)
    best = totals.argmin(dim=0, keepdim=True)
    return candidates.map(lambda field: field.gather(0, best)[0].to(low.dtype))


def _candidates(low: Tensor, high: Tensor, config: QuantizeConfig) -> Grid:
    """Grids over shrunk ranges, fields [candidates, N]; with signed scales also wider search and what a sign adds."""
    # And the one under which, on a symmetric grid, the largest weight is the greatest code: what was rounded so before
    # is found again.
    exact = ((1 << config.bits) - 1) / ((1 << config.bits) - 2)
    shrinks = (*(_WIDE_SHRINK if config.preset.signed_scales else _SHRINK), exact)
    shrink = torch.tensor(shrinks, dtype=low.dtype, device=low.device).unsqueeze(1)
    grid = min_max_grid(low * shrink, high * shrink, config)
    if not config.preset.signed_scales:
        return grid
    if config.sym:
        mirrored = Grid(-grid.scale, grid.zero, grid.low, grid.high)
        return _concatenate([grid, mirrored])
    top = grid.high - grid.low
    shifted = [(grid.zero + shift).clamp(min=0).minimum(top) for shift in (-1, 1)]
    return _concatenate([grid, *(Grid(grid.scale, zero, -zero, top - zero) for zero in shifted)])


def _concatenate(grids: list[Grid]) -> Grid:
    return Grid(*(torch.cat(fields) for fields in zip(*((g.scale, g.zero, g.low, g.high) for g in grids), strict=True)))


def _cost_with_feedback(columns: Tensor, cost: Tensor, spread: Tensor, grids: Grid) -> Tensor:
    """[candidates, N]: what the column loop would make of the group under each of ``grids``."""
    total = torch.zeros_like(grids.scale)
    one_group = torch.zeros(len(columns), dtype=torch.int32, device=columns.device)
    on_cpu = columns.device.type == "cpu"
    for part in torch.arange(columns.shape[1]).split(_SEARCH_ROWS if on_cpu else columns.shape[1]):
        rows = slice(int(part[0]), int(part[-1]) + 1)
        flat = grids.map(lambda field, rows=rows: field[:, rows].reshape(1, -1))  # type: ignore[misc]
        errors = columns[:, rows].repeat(1, len(total))  # [g, candidates * rows]
        round_columns(errors, spread, flat, one_group)
        if on_cpu:
            price = torch.zeros_like(errors[0])
            for error, weight in zip(errors, cost.tolist()):
                price.addcmul_(error, error, value=weight)
        else:
            price = cost @ errors.square_()
        total[:, rows] = price.view(len(total), -1)
    return total
