"""Round columns one after another, each error moving onto those that are still to come.

The column loop (gptq.py), the scale search (scale_search.py) and coordinate descent (refine.py) spend their time here:
in plain torch, or on a GPU, where five small operations per column would be mostly launches, in one Triton kernel per
panel.
"""

from __future__ import annotations

import functools
import importlib
import logging
from functools import partial
from typing import Any

import torch
from torch import Tensor

from .grid import Grid

logger = logging.getLogger(__name__)


def round_columns(
    rest: Tensor,
    spread: Tensor,
    grids: Grid,
    groups: Tensor,
    centred: Tensor | None = None,
    start: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Round the rows of ``rest`` in order; row j > i loses ``spread[i, j]`` times the error of row i.

    Args:
        rest: float [P, N], contiguous: a column of the weight per row. Replaced by the errors.
        spread: [P, P], contiguous rows; what is on and below the diagonal is not read.
        grids: fields [G, N], contiguous.
        groups: int [P], the grid of each column.
        centred: [P, N], contiguous, receives code - zero; None if nobody wants it.
        start: values [P, N] and shares [P]: column i is rounded from ``values - share * rest``, and its error is
            counted from ``values``. That is coordinate descent, with the gradient in ``rest``.
    """
    kernels = _triton() if rest.device.type in ("cuda", "xpu") else None
    if kernels is not None:
        kernels.round_columns(rest, spread, grids, groups, centred, start)
        return
    codes = torch.empty_like(rest[0]).expand_as(rest) if centred is None else centred
    shares = [] if start is None else start[1].tolist()
    grid, last = grids, -1
    for i, group in enumerate(groups.tolist()):
        if group != last:
            grid, last = grids.map(partial(torch.select, dim=0, index=group)), group
        code, error = codes[i], rest[i]
        if start is None:
            grid.round(error, code, error)
        else:
            values = start[0][i]
            torch.add(values, error, alpha=-shares[i], out=code)
            torch.clamp(code.div_(grid.scale).round_(), grid.low, grid.high, out=code)
            torch.addcmul(values, code, grid.scale, value=-1, out=error)
        rest[i + 1 :].addr_(spread[i, i + 1 :], error, alpha=-1)


def rounding_costs(columns: Tensor, cost: Tensor, grids: Grid) -> Tensor:
    """What plain rounding would cost under each grid.

    Args:
        columns: float [g, N], contiguous.
        cost: [g], price of a squared error in each column.
        grids: fields [C, N], contiguous.

    Returns:
        [C, N], in the dtype of the grids.
    """
    kernels = _triton() if columns.device.type in ("cuda", "xpu") else None
    if kernels is not None:
        return kernels.rounding_costs(columns, cost, grids)
    code, error = torch.empty_like(columns), torch.empty_like(columns)
    totals = torch.empty_like(grids.scale)
    for i in range(len(totals)):
        grids.map(partial(torch.select, dim=0, index=i)).round(columns, code, error)
        torch.mv(error.square_().t(), cost, out=totals[i])
    return totals


@functools.cache
def _triton() -> Any:
    """The module of the kernels, or None with a warning."""
    try:
        return importlib.import_module(".columns_triton", __package__)
    except ImportError as error:
        logger.warning("triton is missing (%s): the column loop on a GPU is many times slower without it", error)
        return None
