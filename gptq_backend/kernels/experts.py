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

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..format.weight import LinearSpec
from . import cpu
from .slots import Tensors
from .triton import operators as triton_ops
from .triton import plan as triton_plan

if TYPE_CHECKING:
    from .table import Kernel


class Routing:
    """Which expert each row of y belongs to; the projections of a layer share it.

    Args:
        ids: int [...], one per row; outside of 0..experts-1 for none: such rows come out as zeros.
        experts: E.
    """

    def __init__(self, ids: Tensor, experts: int) -> None:
        ids = ids.flatten()
        self.ids, self.experts = ids if ids.dtype in (torch.int32, torch.int64) else ids.long(), experts
        self._blocks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._runs: list[tuple[int, Tensor]] | None = None

    def blocks(self, block: int, parts: int = 1) -> tuple[Tensor, Tensor]:
        """:func:`sort_by_expert`, with ``parts`` rows in the place of each, of the experts e, E + e, and so on."""
        if (block, parts) not in self._blocks:
            if parts == 1:
                self._blocks[block, 1] = sort_by_expert(self.ids, self.experts, block)
            else:
                order, experts = self.blocks(block)
                of_part = [torch.where(experts < 0, -1, experts + part * self.experts) for part in range(parts)]
                orders = [order * parts + part for part in range(parts)]
                self._blocks[block, parts] = torch.cat(orders), torch.cat(of_part)
        return self._blocks[block, parts]

    def runs(self) -> list[tuple[int, Tensor]]:
        """(expert, int64 row numbers in ascending order) of every expert that has rows. Waits for the device."""
        if self._runs is None:
            known = torch.where((self.ids < 0) | (self.ids >= self.experts), self.experts, self.ids)
            counts = torch.bincount(known, minlength=self.experts + 1).tolist()
            rows = known.argsort(stable=True).split(counts)
            self._runs = [(expert, rows[expert]) for expert in range(self.experts) if counts[expert]]
        return self._runs


@dataclass(frozen=True)
class MoeKernel:
    """What a row of the kernel table offers for experts.

    Args:
        tensors: names of the prepared tensors that are multiplied with; the others need not be stacked.
        apply: ``(spec, stacked, x [rows / top_k, K], routing, top_k, bias [P*E, N] | None) -> y [rows, P*N]``: row r of
            y is row ``r // top_k`` of x times the weights of r's expert, side by side where there are several
            projections, or zeros. x: 16 bits or float32.
        op: the same call through ``torch.ops``, used while tracing.
    """

    tensors: tuple[str, ...]
    apply: Callable[[LinearSpec, Tensors, Tensor, Routing, int, Tensor | None], Tensor]
    op: Callable[[LinearSpec, Tensors, Tensor, Routing, int, Tensor | None], Tensor]


def obstacle(
    kernels: Sequence[Kernel],
    specs: Sequence[LinearSpec],
    prepared: Sequence[Tensors],
    biases: Sequence[Tensor | None],
) -> str | None:
    """What keeps weights, one per expert and projection, from being stacked; None where only their values differ."""
    rows = sorted({kernel.name for kernel in kernels})
    grouped = kernels[0].moe
    if len(rows) > 1:
        return f"are served by the kernels {' and '.join(rows)}"
    if grouped is None:
        return f"are served by the kernel {rows[0]!r}, which has no grouped product"
    for what in ("in_features", "out_features", "bits", "group_size", "scales_dtype"):
        if len(found := {getattr(spec, what) for spec in specs}) > 1:
            return f"differ in {what}: {' and '.join(sorted(map(str, found)))}"
    if len({None if bias is None else bias.dtype for bias in biases}) > 1:
        return "differ in their biases"
    for name in grouped.tensors:
        if len({tensors[name].shape if name in tensors else None for tensors in prepared}) > 1:
            return f"differ in the shape of {name} (zeros, or the order of their input channels)"
    return None


class Grouped(nn.Module):
    """``y[r] = x[r // top_k] @ W[expert of r].T + bias[expert of r]``; its parameters are stacks, with a dimension E.

    Args:
        kernel, spec: of all experts.
        prepared: their tensors, between which there is no :func:`obstacle`.
        biases: [N] of each, or None of all.
    """

    def __init__(
        self, kernel: Kernel, spec: LinearSpec, prepared: Sequence[Tensors], biases: Sequence[Tensor | None]
    ) -> None:
        super().__init__()
        assert kernel.moe is not None
        self.kernel, self.spec = kernel, spec
        for name in kernel.moe.tensors:
            if name in prepared[0]:
                tensors = [each[name] for each in prepared]
                out = cpu.in_huge_pages(tensors[0].new_empty((len(tensors), *tensors[0].shape)))
                if out.is_cpu and tensors[0].is_shared():
                    out.share_memory_()
                self._hold(name, torch.stack(tensors, out=out))
        present = [bias.detach() for bias in biases if bias is not None]
        self._hold("bias", torch.stack(present) if present else None)

    def _hold(self, name: str, tensor: Tensor | None) -> None:
        self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def forward(self, x: Tensor, routing: Routing, top_k: int) -> Tensor:
        """x: 16 bits or float32 [rows / top_k, K] -> [rows, N] in the dtype of x; rows of no expert are zeros."""
        kernel: Any = self.kernel.moe
        call = kernel.op if torch.compiler.is_compiling() or type(x) is not Tensor else kernel.apply
        return call(self.spec, self._parameters, x, routing, top_k, self._parameters["bias"])

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"{len(self.qweight)} experts, {spec.in_features}, {spec.out_features}, bits={spec.bits}, "  # type: ignore[arg-type]
            f"group_size={spec.group_size}, sym={spec.sym}, act_order={spec.act_order}, kernel={self.kernel.name}"
        )


def one_by_one(
    experts: Sequence[Callable[[Tensor], Tensor]], out_features: int, x: Tensor, routing: Routing, top_k: int
) -> Tensor:
    """What ``MoeKernel.apply`` computes, by a call for each expert; for weights that cannot be stacked.

    Each expert that has rows is called with them, in their order; while a CUDA graph is captured, in which nothing may
    depend on where rows go, every expert with all.

    Args:
        experts: functions of x [., K] -> [., N].
        out_features: N.
        x, routing, top_k: as for ``MoeKernel.apply``.
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


def sort_by_expert(ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert, each expert's in whole blocks.

    Args:
        ids: int [...], the expert of each row; outside of 0..experts-1 for none.
        experts: E.
        block: rows of a block.

    Returns:
        order: int32 [blocks * block], row numbers; ``ids.numel()`` for padding.
        experts: int32 [blocks], the expert of each block, -1 for none. Their number depends on shapes only.
    """
    rows = ids.numel()
    # Each expert, and "none", leaves at most one block incomplete; no block but those after the last is empty.
    blocks = min(rows, rows // block + experts + 1)
    flat = ids.flatten().long()
    flat = torch.where((flat < 0) | (flat >= experts), experts, flat)
    by_expert, order = flat.sort(stable=True)
    counts = torch.zeros(experts + 1, dtype=torch.long, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))
    padded = (counts + block - 1) // block * block
    ends = padded.cumsum(0)
    rank = torch.arange(rows, device=ids.device) - (counts.cumsum(0) - counts)[by_expert]
    padded_order = torch.full((blocks * block,), rows, dtype=torch.int32, device=ids.device)
    padded_order[(ends - padded)[by_expert] + rank] = order.int()
    first = torch.arange(0, blocks * block, block, device=ids.device)
    expert = torch.searchsorted(ends, first, right=True)
    return padded_order, torch.where(expert >= experts, -1, expert).int()


# -- the rows of the kernel table --------------------------------------------------------------------------------------


def _cpu_row(a8: bool) -> MoeKernel:
    def call(
        function: Any, spec: LinearSpec, stacked: Tensors, x: Tensor, routing: Routing, top_k: int, bias: Tensor | None
    ) -> Tensor:
        return function(x, *cpu.arguments(spec, stacked, a8), routing.ids, routing.experts, top_k, bias)

    functions = (cpu.moe_gemm, torch.ops.gptq_backend.cpu_moe_gemm)
    names = ("qweight", "scales", "zeros", "perm", "blocks")
    return MoeKernel(names, *(functools.partial(call, function) for function in functions))


def _triton(spec: LinearSpec, stacked: Tensors, x: Tensor, routing: Routing, top_k: int, bias: Tensor | None) -> Tensor:
    parts = stacked["qweight"].shape[0] // routing.experts
    order, experts = routing.blocks(triton_plan.moe_rows(routing.ids.numel(), routing.experts, x.device), parts)
    y = triton_ops.moe_op(spec, stacked, x, order, experts, top_k * parts, bias)
    return y.view(-1, parts * spec.out_features)


CPU, CPU_W4A8 = _cpu_row(a8=False), _cpu_row(a8=True)
TRITON = MoeKernel(("qweight", "scales", "zeros", "perm", "groups"), _triton, _triton)
