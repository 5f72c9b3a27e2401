"""The loops of columns.py as Triton kernels, and their launches. Importing this module needs triton.

A program owns a few output channels, which never meet, and keeps a panel of columns in the registers of one warp: then
nothing in the walk over the columns waits for another warp. Float32; in the interpreter also float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..kernels.devices import on_device

_PANEL = 128  # columns of a program, of which a thread has 64 elements
_BLOCK = 16  # output channels of a program
_WIDE = 64  # the same where columns do not wait for each other


def round_columns(
    rest: Tensor,
    spread: Tensor,
    grids: Any,
    groups: Tensor,
    centred: Tensor | None,
    start: tuple[Tensor, Tensor] | None,
) -> None:
    """See columns.py."""
    count, width = rest.shape
    fields = (grids.scale, grids.low, grids.high)
    assert all(tensor.is_contiguous() for tensor in (rest, *fields))
    with on_device(rest.device):
        for first in range(0, count, _PANEL):
            panel = slice(first, min(first + _PANEL, count))
            size = panel.stop - first
            round_panel[triton.cdiv(width, _BLOCK),](
                *(rest[panel], spread[panel, panel].contiguous(), *fields, groups[panel]),
                None if centred is None else centred[panel],
                *((None, None) if start is None else (start[0][panel], start[1][panel])),
                *(size, width),
                PANEL=max(16, triton.next_power_of_2(size)),
                BLOCK=_BLOCK,
                num_warps=1,
            )
            rest[panel.stop :].addmm_(spread[panel, panel.stop :].t(), rest[panel], alpha=-1)


def rounding_costs(columns: Tensor, cost: Tensor, grids: Any) -> Tensor:
    """See columns.py."""
    count, width = columns.shape
    totals = torch.empty_like(grids.scale)
    fields = (grids.scale, grids.low, grids.high)
    assert all(tensor.is_contiguous() for tensor in (columns, *fields))
    with on_device(columns.device):
        rounding_cost[triton.cdiv(width, _WIDE), len(totals)](
            columns, cost, *fields, totals, count, width, ROWS=16, BLOCK=_WIDE, num_warps=2
        )
    return totals


@triton.jit
def _nearest(value, scale, low, high):
    """The nearest of low..high in units of scale, ties to even, by IEEE division as torch has it."""
    if value.dtype == tl.float64:
        magic = 6755399441055744.0  # 1.5 * 2**52: what is added to it keeps no fraction
        code = value / scale
    else:
        magic = 12582912.0
        code = tl.div_rn(value, scale)
    return (tl.minimum(tl.maximum(code, low), high) + magic) - magic


@triton.jit(do_not_specialize=["count"])
def round_panel(
    rest, spread, scales, lows, highs, groups, centred, values, shares, count, width,
    PANEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK output channels of up to PANEL columns."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    column = tl.arange(0, PANEL)
    inside = n < width
    at = column[:, None] * width + n[None, :]
    panel = tl.load(rest + at, mask=(column < count)[:, None] & inside[None, :], other=0.0)
    for i in range(count):
        value = tl.sum(tl.where((column == i)[:, None], panel, 0.0), 0)
        grid = tl.load(groups + i) * width + n
        scale = tl.load(scales + grid, mask=inside, other=1.0)
        low = tl.load(lows + grid, mask=inside, other=0.0)
        high = tl.load(highs + grid, mask=inside, other=0.0)
        before = value
        if values is not None:
            before = tl.load(values + i * width + n, mask=inside, other=0.0)
            value = before - value * tl.load(shares + i)
        code = _nearest(value, scale, low, high)
        error = before - code * scale
        tl.store(rest + i * width + n, error, mask=inside)
        if centred is not None:
            tl.store(centred + i * width + n, code, mask=inside)
        later = tl.load(spread + i * count + column, mask=(column > i) & (column < count), other=0.0)
        panel -= later[:, None] * error[None, :]


@triton.jit(do_not_specialize=["count"])
def rounding_cost(columns, cost, scales, lows, highs, totals, count, width, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """The cost of BLOCK output channels under one grid."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = n < width
    grid = tl.program_id(1) * width + n
    scale = tl.load(scales + grid, mask=inside, other=1.0)[None, :]
    low = tl.load(lows + grid, mask=inside, other=0.0)[None, :]
    high = tl.load(highs + grid, mask=inside, other=0.0)[None, :]
    total = tl.zeros((BLOCK,), totals.dtype.element_ty)
    for first in range(0, count, ROWS):
        column = first + tl.arange(0, ROWS)
        real = (column < count)[:, None] & inside[None, :]
        value = tl.load(columns + column[:, None] * width + n[None, :], mask=real, other=0.0)
        price = tl.load(cost + column, mask=column < count, other=0.0)
        error = value - _nearest(value, scale, low, high) * scale
        total += tl.sum(error * error * price[:, None], 0)
    tl.store(totals + grid, total, mask=inside)
