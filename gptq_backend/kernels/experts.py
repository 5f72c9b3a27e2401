"""Grouped products for a mixture of experts: every row of x times the weights of its own expert, in one call.

Per layer, once: a :class:`Grouped` of each projection of all experts. Per forward pass::

    routing = Routing(ids, E)                                                  # ids [T, k], the expert of each slot
    hidden = w1(x, routing, k)                                                 # x [T, K] -> [T*k, N]
    y = w2(act(hidden), routing, 1).view(T, k, -1)

Two or more projections of E experts each in one ``Grouped``, the first one's first (gate, up), give their products side
by side. Nothing but the values of y depends on those of ``ids``, so all of it can be captured in a CUDA graph. There is
no gradient: whoever needs one calls the experts' own operators, for example by :func:`one_by_one`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .expert_routing import Routing
from .interface import PreparedWeight
from .operators import operators_are_seen
from .table import expert_kernel


def why_not_groupable(weights: Sequence[PreparedWeight], biases: Sequence[Tensor | None]) -> str | None:
    """What keeps weights, one per expert and projection, from being stacked; None where only their values differ."""
    rows = sorted({weight.kernel.name for weight in weights})
    if len(rows) > 1:
        return f"are served by the kernels {' and '.join(rows)}"
    grouped = expert_kernel(weights[0].kernel)
    if grouped is None:
        return f"are served by the kernel {rows[0]!r}, which has no grouped product"
    for what in ("in_features", "out_features", "bits", "group_size", "scales_dtype"):
        if len(found := {getattr(weight.spec, what) for weight in weights}) > 1:
            return f"differ in {what}: {' and '.join(sorted(map(str, found)))}"
    if len({None if bias is None else bias.dtype for bias in biases}) > 1:
        return "differ in their biases"
    for name in grouped.tensors:
        shapes = {weight.tensors[name].shape if name in weight.tensors else None for weight in weights}
        if len(shapes) > 1:
            return f"differ in the shape of {name} (zeros, or the order of their input channels)"
    return None


class Grouped(nn.Module):
    """``y[r] = x[r // top_k] @ W[expert of r].T + bias[expert of r]``; its parameters are stacks, with a dimension E.

    Args:
        weights: of each expert and projection, between which nothing is :func:`why_not_groupable`.
        biases: [N] of each, or None of all.
    """

    def __init__(self, weights: Sequence[PreparedWeight], biases: Sequence[Tensor | None]) -> None:
        super().__init__()
        row = expert_kernel(weights[0].kernel)
        assert row is not None
        self.row, self.spec, self._facts = row, weights[0].spec, weights[0].facts
        for name in row.tensors:
            if name in weights[0].tensors:
                tensors = [weight.tensors[name] for weight in weights]
                out = row.allocate(tensors[0], (len(tensors), *tensors[0].shape))
                if out.is_cpu and tensors[0].is_shared():
                    out.share_memory_()
                self._hold(name, torch.stack(tensors, out=out))
        present = [bias.detach() for bias in biases if bias is not None]
        self._hold("bias", torch.stack(present) if present else None)

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor, routing: Routing, top_k: int) -> Tensor:
        """x: 16 bits or float32 [rows / top_k, K] -> [rows, N] in the dtype of x; rows of no expert are zeros."""
        call = self.row.op if operators_are_seen() or type(x) is not Tensor else self.row.gemm
        return call(x, self.layout, routing, top_k, self._parameters["bias"])

    @property
    def layout(self) -> tuple[Any, ...]:
        """The kernel's arguments that describe the stacked weights."""
        return (*map(self._parameters.get, self.row.kernel.layout.tensors), *self._facts)

    @property
    def stacked(self) -> int:
        """How many weights there are: experts times projections."""
        return len(self._parameters["qweight"])  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return f"{self.stacked} experts, {self.spec.describe()}, kernel={self.row.kernel.name}"


def one_by_one(
    experts: Sequence[Callable[[Tensor], Tensor]], out_features: int, x: Tensor, routing: Routing, top_k: int
) -> Tensor:
    """What ``ExpertKernel.gemm`` computes, by a call for each expert; for weights that cannot be stacked.

    Each expert that has rows is called with them, in their order; while a CUDA graph is captured, in which nothing may
    depend on where rows go, every expert with all.

    Args:
        experts: functions of x [., K] -> [., N].
        out_features: N.
        x, routing, top_k: as for ``ExpertKernel.gemm``.
    """
    y = x.new_zeros((routing.ids.numel(), out_features))
    if _capturing(x):
        for expert, multiply in enumerate(experts):
            y = torch.where((routing.ids == expert)[:, None], multiply(x).repeat_interleave(top_k, 0), y)
        return y
    for expert, rows in routing.runs():
        y[rows] = experts[expert](x[rows // top_k])
    return y


def _capturing(x: Tensor) -> bool:
    return x.is_cuda and torch.cuda.is_current_stream_capturing()
