"""Errors of output channels that undo each other: the column loop's idea for the rows of a weight.

What an error E [N, K] of a layer does is about ``tr(A E H E^T)``: H is the second moment of the layer's inputs, A that
of the derivatives of what follows by its outputs. With a diagonal A each row is rounded by itself, which is GPTQ. Where
outputs are used together, as those of q and k in products, A is far from diagonal, and rows that are rounded later can
undo a part of what the earlier ones did (YAQA, arXiv 2505.22988). They need not follow each other one by one: rows that
matter most first, in a few turns, gets nearly all of it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..format.weight import QuantizedWeight
from ..timing import timed
from .hessian import damping, factor
from .sharing import Sharing, alone

_TURNS = 8
_DAMPING = 0.3  # a share of the median, as in a Hessian
_BOUND = 0.01  # least damping, a share of the largest: how far a row that hardly matters may move for one that does
_GAIN = 0.9  # largest share of the error that may be left, by the tokens that did not make the factor


@dataclass(frozen=True, eq=False)
class RowFactor:
    """What :func:`in_turns` needs of A."""

    order: Tensor  # [N], rows by falling diagonal
    upper: Tensor  # [N, N] upper triangular U in that order, U^T U = A^-1 (damped)


@timed("factor")
def factor_rows(halves: tuple[Tensor, Tensor], tokens: tuple[int, int], sharing: Sharing = alone) -> RowFactor | None:
    """The factor of A, or None where feedback would not help on tokens that it was not made from.

    Args:
        halves: [N, N] each, A of two parts of the tokens.
        tokens: in each.
        sharing: does part of the factors.
    """
    total = halves[0] + halves[1]
    order = total.diagonal().argsort(descending=True, stable=True)

    def trial(i: int) -> list[Tensor]:
        found = _factor(halves[i], order, tokens[i], alone)
        share = math.inf if found is None else _left(found, _sorted(halves[1 - i], order).to(found.dtype))
        return [torch.tensor(share, dtype=torch.float64)]

    # Shared, so that all ranks read the same numbers and decide alike.
    if not sum(float(share) for (share,) in sharing(2, trial)) / 2 < _GAIN:
        return None
    upper = _factor(total, order, sum(tokens), sharing)
    return None if upper is None else RowFactor(order, upper)


def _factor(moment: Tensor, order: Tensor, tokens: int, sharing: Sharing) -> Tensor | None:
    """U of a :class:`RowFactor`; None where too many rows have no derivative."""
    diagonal = moment.diagonal()
    median = float(diagonal.median())
    if not median > 0:
        return None
    damp = max(damping(_DAMPING, len(order), tokens), _BOUND * float(diagonal.max()) / median)
    wide = torch.float64 if moment.device.type == "cpu" else torch.promote_types(moment.dtype, torch.float32)
    found = factor(_sorted(moment, order).to(wide), damp, sharing)
    return None if found.method == "diagonal" else found.upper


def _sorted(moment: Tensor, order: Tensor) -> Tensor:
    return moment[order][:, order]


def _left(upper: Tensor, moment: Tensor) -> float:
    """The share of the error by ``moment`` that feedback by another one's factor leaves, if all rows have alike errors.

    An error u of row c moves the target of a later row m by ``u U_cm / U_cc``, so E^T is u^T times the rows of U over
    their pivots.
    """
    spread = upper / upper.diagonal().unsqueeze(1)
    return float(((spread @ moment) * spread).sum() / moment.diagonal().sum())


def in_turns(
    weight: Tensor, rows: RowFactor, quantize: Callable[[Tensor], tuple[QuantizedWeight, Tensor]]
) -> tuple[QuantizedWeight, Tensor]:
    """Quantize some rows of ``weight`` [N, K] after others, each time with what is left of the earlier ones' errors.

    Args:
        quantize: makes some rows, and sums over them.

    Returns:
        The whole weight, and the sums of all turns.
    """
    upper, count = rows.upper, len(weight)
    left = weight.to(upper.dtype)[rows.order]
    made, sums = [], []
    edges = [count * i // _TURNS for i in range(_TURNS + 1)]
    for first, stop in itertools.pairwise(sorted(set(edges))):
        quantized, of_turn = quantize(left[first:stop].to(weight.dtype))
        made.append(quantized)
        sums.append(of_turn)
        error = left[first:stop] - quantized.dequantize(upper.dtype)
        if error.isfinite().all():  # else a scale overflows, and the caller refuses it
            pivots = upper[first:stop, first:stop].t()
            left[stop:] -= upper[first:stop, stop:].t() @ torch.linalg.solve_triangular(pivots, error, upper=False)
    places = rows.order.argsort()
    codes, scales, zeros = (
        torch.cat([getattr(each, field) for each in made], dim=1)[:, places] for field in ("codes", "scales", "zeros")
    )
    return QuantizedWeight(codes, scales, zeros, made[0].g_idx, made[0].bits), torch.stack(sums).sum(0)
