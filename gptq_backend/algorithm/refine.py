"""Improve a quantized weight after the column loop, without leaving the format.

The column loop never looks back: a code is final when its column's turn is over, and a group's scale was fitted to the
weight, not to the codes. Both refinements lower the same ``tr((Q - W) H (Q - W)^T)`` that the loop lowers, with the
damped H, and never raise it. Each is a function (Q, W, H) -> Q.
"""

from __future__ import annotations

import dataclasses
import itertools

import torch
from torch import Tensor

from ..format.weight import QuantizedWeight
from ..timing import timed
from .columns import round_columns
from .grid import Grid

_PANEL = 32  # columns between two products with the whole Hessian
_NORMAL_BYTES = 1 << 26  # of the normal equations of one slice of output channels
_RIDGE = 1e-6  # share of the mean diagonal added to each channel's normal equations


@timed("refine")
def refine(
    quantized: QuantizedWeight, weight: Tensor, hessian: Tensor, damp_percent: float, sweeps: int
) -> tuple[QuantizedWeight, list[float]]:
    """Alternate :func:`refit_scales` and :func:`descend` on the damped Hessian.

    Args:
        quantized: the start.
        weight: [N, K], in the dtype of the Hessian.
        hessian: [K, K], symmetric, undamped.
        damp_percent: share of the median of its diagonal that is added to it. It alone keeps the sweeps from fitting
            the calibration tokens better and others worse.
        sweeps: how often.

    Returns:
        The result, and ``tr(D H D^T)`` with the undamped H and D = quantized - given weight after each step, the
        given start first.
    """
    damped = hessian.clone()
    damped.diagonal().add_(damp_percent * damped.diagonal().median())

    def error() -> float:
        difference = quantized.dequantize(weight.dtype) - weight
        return float((difference @ hessian).mul_(difference).sum())

    errors = [error()]
    for _ in range(sweeps):
        quantized = descend(refit_scales(quantized, weight, damped), weight, damped)
        errors.append(error())
    return quantized, errors


def descend(quantized: QuantizedWeight, weight: Tensor, hessian: Tensor) -> QuantizedWeight:
    """One sweep of coordinate descent: each code in turn moves to the best value given all others.

    With D = Q - W the best value of column k alone is ``q_k - (D H)_k / H_kk``, and rounding that is exact
    (arXiv 2406.17542).

    Args:
        quantized: the start.
        weight: [N, K].
        hessian: [K, K], symmetric, with a positive diagonal; dtype of the computation.
    """
    index = quantized.g_idx.long()
    target = weight.t().to(hessian.dtype).contiguous()  # [K, N], as all below
    scales, zeros = quantized.scales.to(hessian.dtype), quantized.zeros.to(hessian.dtype)
    grids = Grid(scales, zeros, -zeros, (1 << quantized.bits) - 1 - zeros)
    centred = quantized.codes.to(hessian.dtype) - zeros[index]
    values = centred * scales[index]
    difference = values - target
    inverse_diagonal = hessian.diagonal().reciprocal()
    for first in range(0, len(index), _PANEL):
        panel = slice(first, first + _PANEL)
        gradient = hessian[panel] @ difference
        start = values[panel], inverse_diagonal[panel]
        round_columns(gradient, hessian[panel, panel], grids, quantized.g_idx[panel], centred[panel], start)
        values[panel] -= gradient  # now the errors, counted from the values
        torch.sub(values[panel], target[panel], out=difference[panel])
    codes = centred.add_(zeros[index]).to(torch.uint8)
    return dataclasses.replace(quantized, codes=codes)


def refit_scales(quantized: QuantizedWeight, weight: Tensor, hessian: Tensor) -> QuantizedWeight:
    """The least-squares scales of all groups at once for the codes as they are (arXiv 2602.02126), rounded as stored.

    An output channel's scales s minimise ``s^T A s - 2 b^T s`` with ``A_gh = c_g^T H c_h`` and ``b_g = c_g^T H w``,
    where c_g holds the codes of group g minus their zero. A channel for which rounding to the stored dtype spoils the
    gain, or where a sign would change, keeps its scales, and so does a group whose codes are all at zero.

    Args: as :func:`descend`.
    """
    dtype, groups = hessian.dtype, quantized.scales.shape[0]
    # Input channels are sorted by group, so that each group is a slice first:stop of the last dimension, in all of
    # centred, pull and both dimensions of the Hessian.
    index, by_group = quantized.g_idx.long().sort(stable=True)
    edges = [0, *torch.bincount(index, minlength=groups).cumsum(0).tolist()]
    sorted_hessian = hessian[by_group][:, by_group]
    centred = (quantized.codes.to(dtype) - quantized.zeros.to(dtype)[quantized.g_idx.long()])[by_group]
    centred = centred.t().contiguous()  # [N, K], code - zero
    # b_g = c_g^T H w is the sum over the group's channels of c * (H w): a product with the membership matrix.
    pull = (weight.to(dtype)[:, by_group] @ sorted_hessian).mul_(centred)  # [N, K]
    member = torch.nn.functional.one_hot(index, groups).to(dtype)  # [K, G]
    before = quantized.scales.t().to(dtype)  # [N, G]
    after = before.clone()
    for rows in torch.arange(len(centred), device=index.device).split(max(1, _NORMAL_BYTES // (groups**2 * 8))):
        codes, old, right = centred[rows], before[rows], pull[rows] @ member
        normal = _normal_equations(codes, sorted_hessian, member, edges)
        diagonal = normal.diagonal(dim1=1, dim2=2)
        empty = diagonal == 0
        ridge = torch.where(empty, 1.0, _RIDGE * diagonal.mean(1, keepdim=True))  # towards the old scales
        new = torch.linalg.solve(normal + torch.diag_embed(ridge), right + ridge * old)
        new = torch.where(empty, old, new.to(quantized.scales.dtype).to(dtype))
        usable = (new.isfinite() & (new.sign() == old.sign())).all(1, keepdim=True)
        better = _quadratic(normal, right, new) < _quadratic(normal, right, old)
        after[rows] = torch.where(usable & better, new, old)
    return dataclasses.replace(quantized, scales=after.t().contiguous().to(quantized.scales.dtype))


def _normal_equations(codes: Tensor, hessian: Tensor, member: Tensor, edges: list[int]) -> Tensor:
    """A [rows, G, G] of :func:`refit_scales`.

    Args:
        codes: [rows, K], code - zero, channels sorted by group.
        hessian: [K, K], likewise.
        member: [K, G], 1 where a channel belongs to a group.
        edges: G + 1, where each group begins.
    """
    groups = member.shape[1]
    normal = codes.new_zeros(len(codes), groups, groups)
    for group, (first, stop) in enumerate(itertools.pairwise(edges)):
        # Row g of A, from its diagonal on: c_g^T H times c, summed over the channels of each later group. What is left
        # of the diagonal follows from symmetry.
        products = (codes[:, first:stop] @ hessian[first:stop, first:]).mul_(codes[:, first:])
        normal[:, group, group:] = products @ member[first:, group:]
    return normal.triu() + normal.triu(1).mT


def _quadratic(normal: Tensor, right: Tensor, scales: Tensor) -> Tensor:
    """``s^T A s - 2 b^T s`` for each row: [rows, 1]."""
    return (((normal @ scales.unsqueeze(2)).squeeze(2) - 2 * right) * scales).sum(1, keepdim=True)
