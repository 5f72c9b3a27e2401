"""One projection of all experts of a layer: a grouped product where they have the same form, else one by one."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from gptq_backend.kernels import Grouped, Routing, one_by_one, why_not_groupable

from .compat import init_logger
from .fused_weight import FusedWeight, QuantizedSegment
from .pieces import AnyPiece

logger = init_logger(f"vllm.{__name__}")


class Experts(nn.Module):
    """``y[r] = x[r // top_k] @ W[expert of r].T + bias[expert of r]``.

    Args:
        pieces: of each expert in turn, see :class:`FusedWeight`.
        dtype, backend: likewise.
        order: where in the outputs of the pieces each of y is: int64 [N], or None for as they are.
    """

    order: Tensor | None

    def __init__(
        self,
        pieces: Iterable[Sequence[AnyPiece]],
        dtype: torch.dtype,
        backend: str | None,
        name: str,
        order: Tensor | None = None,
    ) -> None:
        super().__init__()
        each = [FusedWeight(of_one, dtype, backend, expert=True) for of_one in pieces]
        self.out_features = each[0].out_features
        self.register_buffer("order", None if order is None else order.to(next(each[0].parameters()).device))
        self.descriptions = sorted({segments.describe() for segments in each})
        why = _why_not_groupable(each)
        if why is None:
            self.each = None
            grouped = [_grouped(parts) for parts in zip(*(one.parts for one in each))]
            self.parts = nn.ModuleList(grouped)
            self.kernels = {part.row.kernel.name for part in grouped}
            kernels = " and ".join(sorted(self.kernels))
            logger.info_once("experts, %s: one grouped product of the kernel %s", name, kernels)
        else:
            for segments in each:
                segments.serve_alone()
            self.each = nn.ModuleList(each)
            self.kernels = set().union(*(segments.kernels for segments in each))
            logger.warning_once("experts, %s: they %s, and are multiplied one by one, which is slower", name, why)

    def forward(self, x: Tensor, routing: Routing, top_k: int) -> Tensor:
        """x: float [rows / top_k, K] -> [rows, N] in the dtype of x; rows of no expert are zeros."""
        if self.each is not None:
            y = one_by_one([one.forward for one in self.each], self.out_features, x, routing, top_k)
        else:
            outputs = [part(x, routing, top_k) for part in self.parts]
            y = outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=-1)
        return y if self.order is None else y.index_select(-1, self.order)

    def describe(self) -> str:
        """See :meth:`FusedWeight.describe`."""
        ordered = "" if self.order is None else ", then reordered"
        return f"{'grouped' if self.each is None else 'one by one'}{ordered}: {' | '.join(self.descriptions)}"


def _grouped(parts: Sequence[QuantizedSegment]) -> Grouped:
    return Grouped([part.prepared for part in parts], [part.extra_bias for part in parts])


def _why_not_groupable(each: Sequence[FusedWeight]) -> str | None:
    if len({tuple(part.out_features for part in one.parts) for one in each}) > 1:
        return "differ in the projections that can be joined"
    for parts in zip(*(one.parts for one in each)):
        if not all(isinstance(part, QuantizedSegment) for part in parts):
            return "are not all quantized"
        if why := why_not_groupable([part.prepared for part in parts], [part.extra_bias for part in parts]):
            return why
    return None
