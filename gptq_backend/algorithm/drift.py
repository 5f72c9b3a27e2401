"""A weight that makes up for what rounding the layers before it has done to its input.

A layer's weight W was made for the input x' that the original model feeds it, but what arrives is x. So the weight to
be rounded is the one whose outputs on x come closest to the original's, ``W x'``, by the least squares of GPTQ:

    W + W D (H + damping)^-1    with D = sum (x' - x) x^T and H = sum x x^T

as in GPTAQ (arXiv 2504.02692). Where the layer's output is added to another tensor, as those of o_proj and down_proj
are, the layer makes up for the drift r' - r of that one too (arXiv 2604.07955): ``W D`` gets ``sum (r' - r) x^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from .gptq import LayerFactor
from .hessian import multiply_wide, on_tensor_cores
from .tree_sum import TreeSum


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


def make_up(weight: Tensor, shared: LayerFactor, pull: Tensor) -> Tensor:
    """The weight [N, K] to round in the place of ``weight``.

    Args:
        shared: of the layer's input.
        pull: [N, K], ``W D``, with what the residual adds to it.
    """
    if shared.factor.method == "diagonal":  # each of several like channels would make up for the whole drift
        return weight
    upper, order = shared.factor.upper, shared.order.perm
    change = torch.empty_like(pull, dtype=upper.dtype)
    change[:, order] = pull.to(upper.dtype)[:, order] @ upper.t() @ upper  # U^T U is the inverse of the damped H
    return weight + change.to(weight.dtype)
