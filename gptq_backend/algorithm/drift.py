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

from dataclasses import dataclass

import torch
from torch import Tensor

from .gptq import LayerFactor, row_parts
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
        may_overflow = weights is not None and right.dtype == torch.float16
        if may_overflow or not on_tensor_cores(right, self.dtype):
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


@dataclass(frozen=True, eq=False)
class Drift:
    """What the calibration tokens tell of a layer's drift, by two halves of them."""

    sums: Tensor  # [2, M, K]: D, or ``W D`` with what the residual adds to it
    tokens: tuple[int, int]  # in each half, at least one
    of_output: bool  # whether it is the second; M is N then, else K

    def pulls(self, weight: Tensor, rows: slice) -> Tensor:
        """[2, n, K], ``W D`` with what the residual adds to it, for n rows of a weight [N, K]."""
        return self.sums[:, rows].to(weight) if self.of_output else weight[rows] @ self.sums.to(weight)


def prepare_solver(shared: LayerFactor, tokens: float, sharing: Sharing = alone) -> Factor:
    """The factor to solve with for all layers that read one input; ``sharing`` does part of it.

    tokens: see :func:`hessian.damping`.
    """
    hessian = shared.hessian
    wide = hessian.to(torch.promote_types(hessian.dtype, torch.float32))
    return factor(wide, damping(_DAMPING, len(hessian), tokens), sharing)


def make_up(weight: Tensor, hessian: Tensor, solver: Factor, drift: Drift, sharing: Sharing = alone) -> Tensor:
    """The weight [N, K] to round in the place of ``weight``.

    Args:
        hessian: [K, K], undamped, of the layer's input.
        solver: of that, damped.
        sharing: makes the parts of the change.
    """
    if solver.method == "diagonal":  # each of several like channels would make up for the whole drift
        return weight
    upper = solver.upper
    damp = solver.damp_percent * float(hessian.diagonal().median())
    first = drift.tokens[0] / sum(drift.tokens)
    parts = row_parts(len(weight), weight.device)

    def part(i: int) -> list[Tensor]:
        pulls = drift.pulls(weight, parts[i]).to(upper.dtype)
        changes = pulls @ upper.t() @ upper  # U^T U is the inverse of the damped H
        return [changes.sum(0), parabola(pulls, changes, damp, first)]

    changes, parabolas = zip(*sharing(len(parts), part))
    share = confirmed_share(torch.stack(parabolas).sum(0), first) ** _DOUBT
    return weight + (torch.cat(changes) * share).to(weight.dtype) if share > 0 else weight


def parabola(pulls: Tensor, changes: Tensor, damp: float, first: float) -> Tensor:
    """float64 [b, c]: a half's squared error falls by ``b h - c h^2`` with a share h of the change that the other half
    asks for; both halves scaled to as many tokens, and added up.

    Args:
        pulls: [2, n, K]; changes: [2, n, K], ``pulls (H + damp)^-1``.
        first: share of the tokens in the first half. Each half is taken to have as large a share of H.
    """
    scales = 1 / (2 * first), 1 / (2 * (1 - first))
    b = 4 * scales[0] * scales[1] * (_dot(pulls[0], changes[1]) + _dot(pulls[1], changes[0]))
    c = 0.0
    for scale, pull, change in zip(scales, pulls, changes):
        # (H + damp) change = pull, so tr(C H C^T) needs no product; the other half has half of H, and C is doubled.
        c += scale**2 * 2 * (_dot(pull, change) - damp * _dot(change, change))
    return torch.tensor([b, c], dtype=torch.float64)


def confirmed_share(parabolas: Tensor, first: float) -> float:
    """How much of the change that all tokens ask for is to be made, from 0 to 1, given the sum of all rows'
    :func:`parabola`.

    For a signal s, all tokens with a noise n, and a and 1 - a of them in the halves, these have noises n / a and
    n / (1 - a). So the best share of a half's change is h = s / (s + n / (2 a (1 - a))), and that of all tokens'
    s / (s + n).
    """
    b, c = parabolas.tolist()
    half = min(max(b / (2 * c), 0.0), 1.0) if c > 0 else 0.0
    return half / (half + 2 * first * (1 - first) * (1 - half))


def _dot(left: Tensor, right: Tensor) -> float:
    return float((left * right).sum(dtype=torch.float64))
