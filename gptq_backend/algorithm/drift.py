"""A weight that makes up for what rounding the layers before it has done to its input.

A layer's weight W was made for the input x' that the original model feeds it, but what arrives is x. So the weight to
be rounded is one whose outputs on x come closer to the original's, ``W x'``, by least squares:

    W + share * W D (H + damping)^-1    with D = sum (x' - x) x^T and H = sum x x^T

as in GPTAQ (arXiv 2504.02692), but for the share. Where the layer's output is added to another tensor, as those of
o_proj and down_proj are, the layer makes up for the drift r' - r of that one too (arXiv 2604.07955): ``W D`` gets ``sum
(r' - r) x^T``.

Most of a drift cannot be told from x at all, and what the calibration tokens seem to tell of it is largely chance: K
channels take K / tokens of any noise. Each layer would add that chance to what other text feeds the next. So damping is
strong, and a change that one half of the tokens asks for is taken as far as the other half confirms it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gptq import LayerFactor
from .hessian import Factor, damping, factor, multiply_wide, on_tensor_cores
from .sharing import Sharing, alone
from .tree_sum import TreeSum

_DAMPING = 1.0  # a share of the median, as in a Hessian: more than rounding needs
_DOUBT = 3  # power of the share: the layers before were made for both halves, which agree more than other text will


class CrossMoment:
    """Accumulates ``sum w d x^T`` [M, K] over calibration tokens: x [.., K] is a layer's input, d [.., M] a drift.

    Rows with a non-finite entry are left out. Parts are added as those of a :class:`hessian.Hessian`.
    """

    def __init__(self, rows: int, channels: int, dtype: torch.dtype, device: torch.device, first: int = 0) -> None:
        self.shape, self.dtype, self.device = (rows, channels), dtype, device
        self.sum = TreeSum(first)
        self.tokens = 0
        self.dropped = 0

    @property
    def size(self) -> int:
        """Entries of a part."""
        return self.shape[0] * self.shape[1]

    def add(self, number: int, drift: Tensor, x: Tensor, weights: Tensor | None) -> None:
        """Add a part; see :meth:`hessian.Hessian.add`."""
        left, right = drift.detach().reshape(-1, self.shape[0]), x.detach().reshape(-1, self.shape[1])
        if not on_tensor_cores(right, self.dtype):
            left, right = left.to(self.device, self.dtype), right.to(self.device, self.dtype)
        if weights is not None:
            left = left * weights.reshape(-1, 1).to(left.dtype)
        if not (left.sum(dtype=self.dtype) + right.sum(dtype=self.dtype)).isfinite():  # as in a Hessian
            finite = left.isfinite().all(1) & right.isfinite().all(1)
            self.dropped += int((~finite).sum())
            left, right = left[finite], right[finite]
        if len(right):
            self.tokens += len(right)
            self.sum.add(number, multiply_wide(left.t(), right, self.dtype).flatten())

    def matrix(self) -> Tensor | None:
        """[M, K]; None of no token."""
        total = self.sum.total()
        return None if total is None else total.view(self.shape)


def prepare_solver(shared: LayerFactor, tokens: float, sharing: Sharing = alone) -> Factor:
    """The factor to solve with for all layers that read one input; ``sharing`` does part of it.

    tokens: see :func:`hessian.damping`.
    """
    hessian = shared.hessian
    wide = hessian.to(torch.promote_types(hessian.dtype, torch.float32))
    return factor(wide, damping(_DAMPING, len(hessian), tokens), sharing)


def make_up(weight: Tensor, hessian: Tensor, solver: Factor, pulls: Tensor) -> Tensor:
    """The weight [N, K] to round in the place of ``weight``.

    Args:
        hessian: [K, K], undamped, of the layer's input.
        solver: of that, damped.
        pulls: [2, N, K], ``W D`` with what the residual adds to it, from each of two halves of the tokens.
    """
    if solver.method == "diagonal":  # each of several like channels would make up for the whole drift
        return weight
    upper = solver.upper
    changes = pulls.to(upper.dtype) @ upper.t() @ upper  # U^T U is the inverse of the damped H
    damp = solver.damp_percent * float(hessian.diagonal().median())
    share = confirmed_share(pulls.to(upper.dtype), changes, damp) ** _DOUBT
    if not share > 0:
        return weight
    return weight + (changes.sum(0) * share).to(weight.dtype)


def confirmed_share(pulls: Tensor, changes: Tensor, damp: float) -> float:
    """How much of the change that all tokens ask for is to be made, from 0 to 1.

    With the change of one half, scaled to all tokens (the other half has about the same H), the other half's squared
    error falls by a parabola in the share of it that is made. Its best share is s / (s + n) for a signal s and the
    noise n of a half; all tokens have half of the noise, so theirs is s / (s + n / 2).

    Args:
        pulls: [2, N, K]; changes: [2, N, K], ``pulls (H + damp)^-1``.
    """
    gain = 2 * _dot(pulls[0], changes[1]) + 2 * _dot(pulls[1], changes[0])
    # (H + damp) changes = pulls, so tr(C H C^T) needs no product; the other half has half of H, and C is doubled.
    curve = 2 * _dot(pulls, changes) - 2 * damp * _dot(changes, changes)
    half = min(max(gain / curve, 0.0), 1.0) if curve > 0 else 0.0
    return 2 * half / (1 + half)


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum(dtype=torch.float64))
