"""Grouped products for a mixture of experts: every row of x times the weight of its own expert, in one call.

Per layer: ``stack`` the prepared tensors of one projection of all experts. Per forward pass: ``sort_by_expert`` once,
then ``MoeKernel.multiply`` for each projection::

    moe = MOE_KERNELS[kernel.name]                              # kernel: the row that prepared the experts
    order, experts = sort_by_expert(ids, E, moe.rows(ids.numel(), E, x.device))     # ids [T, k]
    hidden = moe.multiply(spec, w1, x, order, experts, k, None)          # x [T, K] -> [T*k, N]
    y = moe.multiply(spec2, w2, act(hidden), order, experts, 1, None).view(T, k, -1)

Nothing depends on the values of ``ids`` but those of y, so all of it can be captured in a CUDA graph. There is no
gradient: whoever needs one calls the experts' own operators.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import cpu, triton_ops, triton_plan
from .slots import Tensors
from .weight import LinearSpec

_library = torch.library.Library("gptq_backend", "FRAGMENT")
_library.define(
    "cpu_moe_gemm(Tensor x, Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm, Tensor blocks, "
    "int in_features, int out_features, int bits, Tensor order, Tensor experts, int top_k, Tensor? bias) -> Tensor"
)


@dataclass(frozen=True)
class MoeKernel:
    """What a row of the kernel table offers for experts.

    Args:
        rows: ``(rows of y, E, device) -> block``, the argument of :func:`sort_by_expert` that suits the kernel.
        multiply: ``(spec, stacked, x, order, experts, top_k, bias [E, N] | None) -> y [rows of x * top_k, N]``. Row r
            of y is row ``r // top_k`` of x times the weight of r's expert; zeros where r has none.
    """

    rows: Callable[[int, int, torch.device], int]
    multiply: Callable[[LinearSpec, Tensors, Tensor, Tensor, Tensor, int, Tensor | None], Tensor]


def stack(specs: Sequence[LinearSpec], prepared: Sequence[Tensors]) -> Tensors | None:
    """Experts' prepared tensors with a leading dimension E; None where experts differ in more than their values."""

    def form(spec: LinearSpec, tensors: Tensors) -> object:
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in tensors.items()}
        return spec.in_features, spec.out_features, spec.bits, spec.group_size, shapes

    first, *others = map(form, specs, prepared)
    if any(other != first for other in others):
        return None
    return {name: torch.stack([tensors[name] for tensors in prepared]) for name in prepared[0]}


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


def _cpu_moe_gemm(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    blocks: Tensor,
    in_features: int,
    out_features: int,
    bits: int,
    order: Tensor,
    experts: Tensor,
    top_k: int,
    bias: Tensor | None,
) -> Tensor:
    """One product for each expert that has rows. Arguments: see cpu.py, with a leading dimension E; MoeKernel."""
    y = x.new_zeros((x.shape[0] * top_k, out_features))
    start = 0
    for expert, run in itertools.groupby(experts.tolist()):
        end = start + len(list(run)) * (order.numel() // experts.numel())
        rows = order[start:end].long()
        rows, start = rows[rows < len(y)], end
        if expert < 0 or not len(rows):
            continue
        y[rows] = cpu.gemm(
            x[rows // top_k],
            qweight[expert],
            scales[expert],
            None if zeros is None else zeros[expert],
            None if perm is None else perm[expert],
            blocks[expert],
            in_features,
            out_features,
            bits,
            False,
            None if bias is None else bias[expert],
        )
    return y


def _cpu_moe_gemm_fake(x: Tensor, *arguments: Any) -> Tensor:
    out_features, top_k = arguments[6], arguments[10]
    return x.new_empty((x.shape[0] * top_k, out_features))


_library.impl("cpu_moe_gemm", _cpu_moe_gemm, "CPU")
torch.library.register_fake("gptq_backend::cpu_moe_gemm", _cpu_moe_gemm_fake, lib=_library)


def _cpu_multiply(
    spec: LinearSpec, stacked: Tensors, x: Tensor, order: Tensor, experts: Tensor, top_k: int, bias: Tensor | None
) -> Tensor:
    tensors = (stacked["qweight"], stacked["scales"], stacked.get("zeros"), stacked.get("perm"), stacked["blocks"])
    numbers = (spec.in_features, spec.out_features, spec.bits)
    return torch.ops.gptq_backend.cpu_moe_gemm(x, *tensors, *numbers, order, experts, top_k, bias)


# By the name of the row of the kernel table that prepared the experts.
MOE_KERNELS = {
    "cpu": MoeKernel(lambda rows, experts, device: 1, _cpu_multiply),
    "triton": MoeKernel(triton_plan.moe_rows, triton_ops.moe_op),
}
