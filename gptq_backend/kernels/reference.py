"""The operators ``torch.ops.gptq_backend.*`` over checkpoint tensors, in plain torch.

Registered with ``torch.library`` (schema, fake, autograd with respect to ``x``), they run on every device and are what
the ``reference`` row of the kernel table calls. Arguments common to both, with K, N, G as in docs/format.md:

    qweight [ceil(K*bits/w), N] and qzeros [G, ceil(N*bits/w)], integer words of w bits; scales float [G, N];
    g_idx int32 [K] or None for ``k // group_size``; zero_offset is added to each stored zero (1: gptq, 0: gptq_v2);
    planar tells the two 3-bit layouts apart (see packing.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..format import packing
from ..format.stored_tensors import StoredSpec, unpack_codes, unpack_zeros
from ..format.weight import PackedWeight, WeightSpec
from .interface import Kernel, Layout, PreparedWeight, Tensors
from .operators import check_ids, check_input, define_lookup, define_operators


class WeightFields(NamedTuple):
    """The arguments above. A packed weight is stored as ``gptq_v2`` stores it: zeros as they are, codes in a stream."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor
    g_idx: Tensor | None
    in_features: int
    bits: int
    group_size: int
    zero_offset: int
    planar: bool

    @property
    def out_features(self) -> int:
        return self.scales.shape[1]

    @property
    def spec(self) -> StoredSpec:
        """What tells how the tensors are packed."""
        return StoredSpec(
            self.in_features,
            self.out_features,
            self.bits,
            self.group_size,
            groups=self.scales.shape[0],
            zero_offset=self.zero_offset,
            planar=self.planar,
            word_dtype=self.qweight.dtype,
        )

    def dense(self, zeros: Tensor, columns: slice, dtype: torch.dtype) -> Tensor:
        """[K, n] of some output channels. zeros: uint8 [G, N]."""
        spec, zeros, scales = self.spec, zeros[:, columns].to(dtype), self.scales[:, columns].to(dtype)
        dense = unpack_codes(spec, self.qweight[:, columns]).to(dtype)
        if self.g_idx is None and spec.in_features == spec.groups * spec.group_size:
            # Broadcasting over each group saves two [K, n] gathers: half of the time.
            dense.view(spec.groups, spec.group_size, -1).sub_(zeros.unsqueeze(1)).mul_(scales.unsqueeze(1))
            return dense
        index = (spec.trivial_g_idx.to(dense.device) if self.g_idx is None else self.g_idx).long()
        return dense.sub_(zeros[index]).mul_(scales[index])


# Largest dense slice that exists at a time: 64 MiB in float32.
_MAX_DENSE_ELEMENTS = 1 << 24


def dequantize(*layout_and_dtype: Any) -> Tensor:
    """Dense weight [K, N] in ``dtype``, the transpose of ``nn.Linear.weight``. Arguments: see the module."""
    *fields, dtype = layout_and_dtype
    w = WeightFields(*fields)
    return w.dense(unpack_zeros(w.spec, w.qzeros), slice(None), dtype)


def gemm(x: Tensor, *layout_and_bias: Any) -> Tensor:
    """``x @ W.T + bias``. x: float [..., K] -> [..., N] in the dtype of x. Other arguments: see the module.

    16-bit inputs are multiplied in float32 on a CPU (which also is faster where it lacks 16-bit units) and in their
    own dtype elsewhere. Output channels are done in slices, so that the dense weight never exists as a whole.
    """
    *fields, bias = layout_and_bias
    w = WeightFields(*fields)
    check_input(x, w.qweight.device, w.in_features, w.out_features, bias)
    compute = torch.float32 if x.device.type == "cpu" and x.dtype != torch.float64 else x.dtype
    rows = x.reshape(-1, w.in_features).to(compute)
    zeros = unpack_zeros(w.spec, w.qzeros)
    step = max(1, _MAX_DENSE_ELEMENTS // w.in_features)
    parts = [rows @ w.dense(zeros, slice(n, n + step), compute) for n in range(0, w.out_features, step)]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, dim=1)
    if bias is not None:
        y = y + bias.to(compute)
    return y.to(x.dtype).view(*x.shape[:-1], w.out_features)


def look_up(ids: Tensor, *layout_and_dtype: Any) -> Tensor:
    """Rows of ``nn.Linear.weight``. ids: int [...] -> [..., K] in ``dtype``. Other arguments: see the module."""
    *fields, dtype = layout_and_dtype
    w = WeightFields(*fields)
    check_ids(ids, w.qweight.device, w.out_features)
    if not ids.numel():
        return w.scales.new_empty((*ids.shape, w.in_features), dtype=dtype)
    columns = ids.reshape(-1)
    zeros = unpack_zeros(w.spec, w.qzeros)
    few = w._replace(qweight=w.qweight.index_select(1, columns), scales=w.scales.index_select(1, columns))
    dense = few.dense(zeros.index_select(1, columns), slice(None), torch.promote_types(dtype, torch.float32))
    return dense.t().to(dtype).contiguous().view(*ids.shape, w.in_features)


def _look_up_input(ids: Tensor, *layout_and_dtype: Any) -> Tensor:
    """Rows of the weight [K, N], for one whose input channels are tokens. ids: int [...] -> [..., N] in ``dtype``.

    Other arguments: as :func:`prepare` makes them.
    """
    *fields, dtype = layout_and_dtype
    w = WeightFields(*fields)
    check_ids(ids, w.qweight.device, w.in_features)
    if not ids.numel():
        return w.scales.new_empty((*ids.shape, w.out_features), dtype=dtype)
    flat = ids.reshape(-1).long()
    # Codes of 3 bits cross words: the words of a whole run are taken. A ragged tail is stored without its last ones.
    run = 32 if w.bits == 3 else 32 // w.bits
    first = flat.div(run, rounding_mode="floor").unsqueeze(1) * (run * w.bits // 32)
    places = (first + torch.arange(run * w.bits // 32, device=flat.device)).clamp(max=w.qweight.shape[0] - 1)
    words = w.qweight.index_select(0, places.view(-1)).view(*places.shape, -1)
    codes = packing.unpack_stream(words, w.bits)[torch.arange(len(flat), device=flat.device), flat % run]
    groups = flat.div(w.group_size, rounding_mode="floor") if w.g_idx is None else w.g_idx[flat].long()
    wide = torch.promote_types(dtype, torch.float32)
    zeros = unpack_zeros(w.spec, w.qzeros.index_select(0, groups)).to(wide)
    dense = (codes.to(wide) - zeros) * w.scales.index_select(0, groups).to(wide)
    return dense.to(dtype).contiguous().view(*ids.shape, w.out_features)


def prepare(weight: PackedWeight) -> Tensors:
    """The tensors of a checkpoint again; see ``Kernel``."""
    qzeros = packing.pack(weight.zeros.t(), weight.spec.bits).t().contiguous()
    return {"qweight": weight.qweight.contiguous(), "qzeros": qzeros, "scales": weight.scales.contiguous()}


def unprepare(spec: WeightSpec, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor | None]:
    """See ``Kernel``."""
    zeros = packing.unpack(tensors["qzeros"].t(), spec.bits, spec.out_features).t()
    return tensors["qweight"], tensors["scales"], zeros


LAYOUT = Layout(WeightFields, constants=(0, False))
KERNEL = Kernel(
    "reference",
    lambda spec, device: None,
    prepare,
    unprepare,
    LAYOUT,
    gemm,
    *define_operators("", LAYOUT, gemm, dequantize, look_up),
)
_look_up_input_op = define_lookup("look_up_input", LAYOUT, _look_up_input, lambda weight: weight.out_features)


def look_up_input(ids: Tensor, weight: PreparedWeight, dtype: torch.dtype, parameters: Mapping[str, Any]) -> Tensor:
    """Rows of the weight [K, N] that this row of the table has prepared, as ``PreparedWeight.look_up`` of [N, K]."""
    return _look_up_input_op(ids, *map(parameters.get, LAYOUT.tensors), *weight.facts, dtype)
