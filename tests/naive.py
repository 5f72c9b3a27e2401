"""GPTQ as the paper states it, in float64 and without any of the tricks: the yardstick for gptq_backend.algorithm.gptq.

One column at a time: round it, push its error onto the columns that remain (Frantar et al., arXiv 2210.17323, eq. 2),
and take it out of the explicit inverse Hessian by Gaussian elimination (eq. 3). No Cholesky factor, no blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gptq_backend.algorithm.scale_search import _SHRINK
from gptq_backend.config import QuantizeConfig
from gptq_backend.format.weight import QuantizedWeight


def gptq(weight: Tensor, hessian: Tensor | None, config: QuantizeConfig) -> QuantizedWeight:
    """weight [N, K], hessian [K, K] or None to round to nearest."""
    w, k = weight.double().clone(), weight.shape[1]
    hessian = torch.eye(k, dtype=torch.float64) if hessian is None else hessian.double().clone()
    live = hessian.diagonal()[hessian.diagonal() > 0]
    hessian.diagonal()[hessian.diagonal() == 0] = live.median() if len(live) else 1
    order, g_idx = column_order(hessian.diagonal().tolist(), config)
    damped = hessian + config.damp_percent * hessian.diagonal().median() * torch.eye(k, dtype=torch.float64)
    pivot, row = {}, {}  # of the inverse Hessian of the columns that remain when a column's turn comes
    inverse = damped.inverse()
    for c in order:
        pivot[c], row[c] = inverse[c, c].item(), inverse[c].clone()
        inverse = inverse - torch.outer(inverse[:, c], inverse[c]) / inverse[c, c]
    grids: dict[int, tuple[Tensor, Tensor]] = {}

    def fit(group: int) -> None:
        members = [c for c in order if g_idx[c] == group]
        grids[group] = grid(w[:, members], [1 / pivot[c] for c in members], config)

    if config.static_groups:
        for group in range(max(g_idx) + 1):
            fit(group)
    codes = torch.zeros(k, w.shape[0], dtype=torch.uint8)
    for position, c in enumerate(order):
        if g_idx[c] not in grids:
            fit(g_idx[c])
        scale, zero = grids[g_idx[c]]
        code = (torch.round(w[:, c] / scale) + zero).clamp(0, 2**config.bits - 1)
        codes[c] = code.to(torch.uint8)
        error = (w[:, c] - (code - zero) * scale) / pivot[c]
        later = order[position + 1 :]
        w[:, later] -= torch.outer(error, row[c][later])
    scales, zeros = (torch.stack([grids[g][i] for g in sorted(grids)]) for i in (0, 1))
    return QuantizedWeight(codes, scales.half(), zeros.to(torch.uint8), torch.tensor(g_idx).int(), config.bits)


def column_order(diagonal: list[float], config: QuantizeConfig) -> tuple[list[int], list[int]]:
    """The order of the columns, and the group of each column."""
    k = len(diagonal)
    size = k if config.group_size == -1 else config.group_size
    groups = [list(range(first, min(first + size, k))) for first in range(0, k, size)]
    falling = sorted(range(k), key=lambda c: (-diagonal[c], c))
    if config.desc_act:
        chunks = groups if config.static_groups else [falling[first : first + size] for first in range(0, k, size)]
        order = falling
    elif config.group_aware:
        chunks = groups
        first = sorted(range(len(groups)), key=lambda g: (-max(diagonal[c] for c in groups[g]), g))
        order = [c for g in first for c in sorted(groups[g], key=lambda c: (-diagonal[c], c))]
    else:
        chunks, order = groups, list(range(k))
    return order, [next(g for g, chunk in enumerate(chunks) if c in chunk) for c in range(k)]


def grid(columns: Tensor, cost: list[float], config: QuantizeConfig) -> tuple[Tensor, Tensor]:
    """Scale and zero of one group [N, g], one output channel at a time."""
    scales, zeros, top = [], [], 2**config.bits - 1
    for values in columns.tolist():
        low, high = min(0.0, *values), max(0.0, *values)
        if config.sym:
            high = max(-low, high)
            low = -high
        best = math.inf
        for shrink in (*_SHRINK, top / (top - 1)) if config.scale_search else (1.0,):
            step = (high * shrink - low * shrink) / top or 1.0
            scale = float(torch.tensor(max(step, 2.0**-14), dtype=torch.float64).half())
            zero = 2 ** (config.bits - 1) if config.sym else min(max(round(-low * shrink / scale), 0), top)
            rounded = [(min(max(round(v / scale) + zero, 0), top) - zero) * scale for v in values]
            total = sum(c * (r - v) ** 2 for c, r, v in zip(cost, rounded, values, strict=True))
            if total < best:
                best, chosen = total, (scale, zero)
        scales.append(chosen[0])
        zeros.append(chosen[1])
    return torch.tensor(scales, dtype=torch.float64), torch.tensor(zeros, dtype=torch.float64)
