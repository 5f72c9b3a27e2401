"""The ``triton`` row of the kernel table: Triton kernels for AMD and Intel GPUs, and NVIDIA's without a compiler.

The weight is as layout.py prepares it. triton is imported with the first call.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import math
import os
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...format.weight import WeightSpec
from ..devices import DTYPE_CODES, cdiv, on_device
from ..expert_routing import Routing
from ..interface import ExpertKernel, Kernel, Layout
from ..operators import check_ids, check_input, check_prepared, define_grouped, define_operators
from . import layout
from . import plan as triton_plan
from .layout import PLANE, planes
from .plan import Tile

# Try the neighbours of a plan and keep the fastest.
AUTOTUNE = os.environ.get("GPTQ_BACKEND_TRITON_AUTOTUNE", "0") not in ("", "0")
# Largest dense slice that exists at a time.
_MAX_DENSE_ELEMENTS = 1 << 26


@functools.cache
def _missing() -> str | None:
    """Why triton cannot be used, or None."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not there ({error}); pip install triton (Intel GPUs: the build that torch for XPU names)"
    return None


def supports(spec: WeightSpec, device: torch.device) -> str | None:
    """``None``, or why these kernels cannot serve the layer."""
    if device.type not in ("cuda", "xpu"):
        return "serves GPUs"
    if reason := _missing():
        return reason
    if not torch.get_device_module(device).is_available():
        return f"torch sees no {device.type} device"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton needs compute capability 8.0, {torch.cuda.get_device_name(device)} is older"
    if spec.scales_dtype not in DTYPE_CODES:
        return f"{spec.scales_dtype} scales"
    return None


# -- launching ---------------------------------------------------------------------------------------------------------


@functools.cache
def _kernels() -> Any:
    return importlib.import_module(".programs", __package__)


class WeightFields(NamedTuple):
    """What describes a weight to the operators; of experts, the tensors have a leading dimension E."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    groups: Tensor | None
    in_features: int
    out_features: int
    bits: int
    group_size: int

    @property
    def slabs(self) -> int:
        return self.qweight.shape[-3]

    @property
    def slots(self) -> int:
        return self.slabs * planes(self.bits) * PLANE

    @property
    def group_planes(self) -> int:
        """Planes of each group, unless ``groups`` tells."""
        return self.slots // PLANE if self.scales.shape[-2] == 1 else cdiv(self.group_size, PLANE)

    @property
    def sizes(self) -> tuple[int, int, int]:
        """What the kernels call width, group_planes and last_group."""
        return self.scales.shape[-1], self.group_planes, self.scales.shape[-2] - 1

    @property
    def share(self) -> int:
        """Planes in sequence that are sure to lie in one group."""
        if self.scales.shape[-2] == 1:
            return planes(self.bits)
        return 1 if self.groups is not None else math.gcd(self.group_planes, planes(self.bits))


def _multiply(
    x: Tensor,
    w: WeightFields,
    bias: Tensor | None,
    tile: Tile,
    splits: int,
    order: Tensor | None = None,
    experts: Tensor | None = None,
    top_k: int = 1,
) -> Tensor:
    """x [rows / top_k, K] -> y [rows, N]; order and experts as in programs.gemm."""
    kernels, rows = _kernels(), x.shape[0] * top_k
    y = x.new_empty((rows, w.out_features))
    # The splits of a sum are added in a fixed order, never by atomics: results repeat bit for bit.
    parts = y if splits == 1 else x.new_empty((splits, rows, w.out_features), dtype=torch.float32)
    columns, slabs = cdiv(w.out_features, tile.columns), (w.slabs, cdiv(w.slabs, splits))
    tensors = (w.qweight, w.scales, w.zeros)
    options = {
        "BITS": w.bits,
        "SHARE": w.share,
        "BLOCK_N": tile.columns,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    with on_device(x.device):
        if tile.rows == 1:
            numbers = (w.in_features, w.out_features, *slabs, *w.sizes)
            kernels.gemv[columns, splits](x, *tensors, w.perm, w.groups, bias, parts, *numbers, **options)
        else:
            options["BLOCK_M"] = tile.rows
            routing, features = (order, experts, rows, top_k), w.in_features
            if w.perm is not None:
                gathered = x.new_empty((rows if order is None else order.numel(), w.slots))
                kernels.gather[len(gathered), cdiv(w.slots, 1024)](
                    x, w.perm, gathered, *routing, features, w.slots, BLOCK_M=tile.rows, BLOCK=1024
                )
                x, features = gathered, w.slots
            tiles = cdiv(rows, tile.rows) if experts is None else experts.numel()
            shape = (features, w.out_features, *slabs, *w.sizes)
            kernels.gemm[tiles, columns, splits](
                x, *tensors, w.groups, bias, parts, *routing, *shape, SORTED=w.perm is not None, **options
            )
        if splits > 1:
            kernels.add_splits[cdiv(y.numel(), 1024),](parts, y, y.numel(), splits, BLOCK=1024)
    return y


def _dense(w: WeightFields, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """[K, stop - start]: output channels of the dense weight."""
    y = torch.empty((w.in_features, stop - start), dtype=dtype, device=w.qweight.device)
    with on_device(y.device):
        _kernels().dequantize[w.slabs, cdiv(stop - start, 128)](
            *(w.qweight, w.scales, w.zeros, w.perm, w.groups, y, w.in_features, stop - start, start, *w.sizes),
            BITS=w.bits,
            BLOCK_N=128,
        )
    return y


_tuned: dict[tuple[Any, ...], tuple[Tile, int]] = {}


def _plan(x: Tensor, w: WeightFields) -> tuple[Tile, int]:
    """The heuristics' choice, or with GPTQ_BACKEND_TRITON_AUTOTUNE=1 the fastest of its neighbours."""
    first = triton_plan.plan(x.shape[0], w.out_features, w.slabs, w.bits, x.itemsize, x.device)
    if not AUTOTUNE or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return first
    key = (x.device, x.dtype, w.bits, w.share, w.slabs, w.out_features, first[0].rows, x.shape[0].bit_length())
    if key not in _tuned:
        time = importlib.import_module("triton.testing").do_bench
        choices = {
            (dataclasses.replace(first[0], columns=columns, warps=warps), cdiv(w.slabs, cdiv(w.slabs, splits)))
            for columns in (64, 128, 256)
            for warps in (4, 8)
            for splits in {max(1, first[1] // 2), first[1], min(w.slabs, first[1] * 2)}
        }
        _tuned[key] = min(choices, key=lambda choice: time(lambda: _multiply(x, w, None, *choice)))
    return _tuned[key]


# -- operators ---------------------------------------------------------------------------------------------------------


def gemm(x: Tensor, *layout_and_bias: Any) -> Tensor:
    """``x @ W.T + bias``. x: float [..., K] -> [..., N] in the dtype of x. Other arguments: see the module.

    16-bit and float32 inputs meet exact codes, with sums and scales in float32; from ``Heuristics.dense_rows`` rows on,
    a weight rounded to the dtype of x. float64 goes through the dense weight too.

    Raises:
        ValueError: see ``check_input`` and ``check_prepared``.
    """
    *fields, bias = layout_and_bias
    w = WeightFields(*fields)
    check_prepared(w.qweight)
    check_input(x, w.qweight.device, w.in_features, w.out_features, bias)
    rows = x.reshape(-1, w.in_features).contiguous()
    if not len(rows):
        return x.new_empty((*x.shape[:-1], w.out_features))
    if x.dtype in DTYPE_CODES and len(rows) < triton_plan.machine(x.device).heuristics.dense_rows:
        y = _multiply(rows, w, bias, *_plan(rows, w))
    else:
        step = max(1, _MAX_DENSE_ELEMENTS // w.in_features // 128) * 128
        parts = [rows @ _dense(w, x.dtype, n, min(n + step, w.out_features)) for n in range(0, w.out_features, step)]
        y = parts[0] if len(parts) == 1 else torch.cat(parts, 1)
        if bias is not None:
            y += bias.to(x.dtype)
    return y.view(*x.shape[:-1], w.out_features)


def dequantize(*layout_and_dtype: Any) -> Tensor:
    """Dense weight [K, N] in ``dtype``, the transpose of ``nn.Linear.weight``. Other arguments: see the module."""
    *fields, dtype = layout_and_dtype
    w = WeightFields(*fields)
    return _dense(w, dtype, 0, w.out_features)


def look_up(ids: Tensor, *layout_and_dtype: Any) -> Tensor:
    """Rows of ``nn.Linear.weight``. ids: int [...] -> [..., K] in ``dtype``. Other arguments: see the module."""
    *fields, dtype = layout_and_dtype
    w = WeightFields(*fields)
    check_ids(ids, w.qweight.device)
    if not ids.numel():
        return w.scales.new_empty((*ids.shape, w.in_features), dtype=dtype)
    groups = w.groups
    if groups is None:
        plane = torch.arange(w.slots // PLANE, device=ids.device)
        groups = plane.div(w.group_planes, rounding_mode="floor").clamp(max=w.scales.shape[0] - 1)
    weight = (w.qweight, w.scales, w.zeros, groups, w.perm)
    rows = layout.rows_at(ids.reshape(-1).long(), *weight, w.bits, w.in_features)
    return rows.to(dtype).contiguous().view(*ids.shape, w.in_features)


def moe_gemm(x: Tensor, *layout_and_more: Any) -> Tensor:
    """Each row of x times the weight of its expert; see experts.py. The layout's tensors have a leading dimension E."""
    *fields, order, experts, top_k, bias = layout_and_more
    w = WeightFields(*fields)
    check_input(x, w.qweight.device, w.in_features, w.out_features, None)
    if not len(x):
        return x.new_empty((0, w.out_features))
    if x.dtype not in DTYPE_CODES:
        raise ValueError(f"x is {x.dtype}, expected one of {', '.join(map(str, DTYPE_CODES))}; cast it")
    rows = order.numel() // experts.numel()
    tile = next(tile for tile in triton_plan.fitting_tiles(w.bits, x.itemsize, x.device) if tile.rows == rows)
    splits = triton_plan.splits(experts.numel() * cdiv(w.out_features, tile.columns), w.slabs, x.device)
    return _multiply(x.contiguous(), w, bias, tile, splits, order, experts, top_k)


_LAYOUT = Layout(WeightFields)
KERNEL = Kernel(
    "triton",
    supports,
    layout.prepare,
    layout.unprepare,
    _LAYOUT,
    gemm,
    *define_operators("triton_", _LAYOUT, gemm, dequantize, look_up),
)
moe_op = define_grouped(
    "triton_moe_gemm",
    _LAYOUT,
    "Tensor order, Tensor experts, int top_k, Tensor? bias",
    moe_gemm,
    lambda x, w, order, experts, top_k, bias: (x.shape[0] * top_k, w.out_features),
)


def _grouped(x: Tensor, layout: tuple[Any, ...], routing: Routing, top_k: int, bias: Tensor | None) -> Tensor:
    # Several projections of E experts are E times as many experts; their rows lie side by side in y.
    parts = len(layout[0]) // routing.experts
    order, experts = routing.blocks(triton_plan.moe_rows(routing.ids.numel(), routing.experts, x.device), parts)
    return moe_op(x, *layout, order, experts, top_k * parts, bias).view(routing.ids.numel(), -1)


EXPERTS = ExpertKernel(KERNEL, ("qweight", "scales", "zeros", "perm", "groups"), _grouped, _grouped)
