"""The ``cuda`` row of the kernel table: CUDA C++ kernels for NVIDIA GPUs (device/, csrc/cuda).

Which kernel multiplies, and how it cuts the work, is for plan_tables.py to say; the weight is as layout.py prepares it.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...format.weight import WeightSpec
from ..devices import DTYPE_CODES
from ..interface import Kernel, Layout
from ..operators import check_ids, check_input, check_prepared, define_operators
from ..slots import by_channel
from . import layout, loading
from .loading import extension as _cuda
from .plan import Plan, Shape
from .plan_tables import best_plan

# Largest dense slice that exists at a time: one that a second-level cache holds would leave multiprocessors idle.
_DENSE_ELEMENTS = 1 << 26


class WeightFields(NamedTuple):
    """What describes a weight to the operators."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    in_features: int
    out_features: int
    bits: int


def supports(spec: WeightSpec, device: torch.device) -> str | None:
    """``None``, or why these kernels cannot serve the layer."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "serves NVIDIA GPUs"
    if _cuda is None:
        return loading.MISSING
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if spec.scales_dtype not in DTYPE_CODES:
        return f"{spec.scales_dtype} scales"
    torch.cuda.init()  # before the driver is used: torch knows then what may not be done after a fork
    return loading.unfit(torch.cuda.current_device() if device.index is None else device.index, spec.bits)


@functools.cache
def _multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has matrix units for ``dtype``; the rest goes through the dense weight."""
    if dtype == torch.bfloat16:
        return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    return dtype == torch.float16


# -- operators ---------------------------------------------------------------------------------------------------------


def _where(x: Tensor) -> tuple[int, int]:
    """Device index and stream handle. The extension makes the device's context current by itself."""
    if not x.is_cuda:
        return 0, 0
    return x.device.index, torch._C._cuda_getCurrentRawStream(x.device.index)


def _weight(w: WeightFields) -> Any:
    """For the extension; its kernels are loaded then, also for a layer that was moved here from another device."""
    loading.require(w.qweight.device.index or 0, w.bits)
    return _cuda.Weight(
        w.qweight.data_ptr(),
        w.scales.data_ptr(),
        DTYPE_CODES[w.scales.dtype],
        0 if w.zeros is None else w.zeros.data_ptr(),
        w.bits,
        w.out_features,
        w.qweight.shape[0],
        w.qweight.shape[1],
        w.scales.shape[1],
    )


def _gather(x: Tensor, perm: Tensor, bits: int) -> Tensor:
    """x [rows, K] in slot order. bits: of the kernels that are loaded."""
    y = x.new_empty((x.shape[0], perm.shape[0]))
    index, stream = _where(x)
    sizes = (*x.shape, x.element_size())
    _cuda.gather(index, bits, x.data_ptr(), *sizes, perm.data_ptr(), perm.shape[0], y.data_ptr(), stream)
    return y


def _dense(weight: Any, like: Tensor, first: int, channels: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[channels, columns] of the weight in slot order."""
    dense = torch.empty((channels, columns), dtype=dtype, device=like.device)
    index, stream = _where(like)
    _cuda.dequantize(index, weight, first, channels, columns, dense.data_ptr(), DTYPE_CODES[dtype], stream)
    return dense


def gemm(x: Tensor, *layout_and_bias: Any) -> Tensor:
    """``x @ W.T + bias``. x: float [..., K] -> [..., N] in the dtype of x.

    Few rows in 16 bits meet exact codes, with sums and scales in float32. Many rows, float32 and float64 go through a
    weight rounded to the dtype of x (float64: to float32) and cuBLAS.

    Raises:
        ValueError: see ``check_input`` and ``check_prepared``.
    """
    *fields, bias = layout_and_bias
    w = WeightFields(*fields)
    check_prepared(w.qweight)
    check_input(x, w.qweight.device, w.in_features, w.out_features, bias)
    how = None
    if _multiplies(x.dtype, x.device):
        shape = Shape(w.bits, w.out_features, w.qweight.shape[1])
        how = best_plan(x.numel() // w.in_features, shape, x.device)
    return planned_gemm(x, w, bias, how)


def planned_gemm(x: Tensor, w: WeightFields, bias: Tensor | None, how: Plan | None) -> Tensor:
    """The product of :func:`gemm`, cut as ``how`` says; None: through the dense weight. Nothing is checked."""
    y = x.new_empty((*x.shape[:-1], w.out_features))
    rows = x.numel() // w.in_features
    if not y.numel():
        return y
    weight = _weight(w)
    compute = x.dtype if x.dtype in DTYPE_CODES else torch.float32
    x2 = x.reshape(rows, w.in_features).to(compute).contiguous()
    if w.perm is not None:
        x2 = _gather(x2, w.perm, w.bits)
    elif x2.data_ptr() % 16:
        x2 = x2.clone()
    if how is not None:
        _multiply(x2, weight, bias, y, how)
        return y
    compute_y = y.view(rows, w.out_features).to(compute)
    _through_dense(x2, weight, bias, compute_y)
    return compute_y.to(x.dtype).view(y.shape)


def _multiply(x: Tensor, weight: Any, bias: Tensor | None, y: Tensor, how: Plan) -> None:
    """y [..., N] = x [rows, columns] W^T + bias, by the kernel of a plan."""
    if bias is not None:
        bias = (bias if bias.dtype in DTYPE_CODES else bias.float()).contiguous()
    partials = None
    if how.splits > 1:
        partials = torch.empty((how.splits, len(x), y.shape[-1]), dtype=torch.float32, device=x.device)
    index, stream = _where(x)
    _cuda.multiply(
        index,
        weight,
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        *x.shape,
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPE_CODES[bias.dtype],
        y.data_ptr(),
        0 if partials is None else partials.data_ptr(),
        how.strips,
        how.tokens,
        how.warps,
        how.splits,
        stream,
    )


@torch.no_grad()
def _through_dense(x: Tensor, weight: Any, bias: Tensor | None, y: Tensor) -> None:
    """y [rows, N] = x [rows, columns] W^T + bias, in slices of the output channels."""
    step = max(1, _DENSE_ELEMENTS // (x.shape[1] * 128)) * 128
    for first in range(0, y.shape[1], step):
        part = y[:, first : first + step]
        dense = _dense(weight, x, first, part.shape[1], x.shape[1], x.dtype).t()
        if bias is None:
            torch.mm(x, dense, out=part)
        else:
            torch.addmm(bias[first : first + step].to(x.dtype), x, dense, out=part)


def dequantize(*layout_and_dtype: Any) -> Tensor:
    """Dense weight [K, N] in ``dtype``, the transpose of ``nn.Linear.weight``, which is how it lies in memory."""
    *fields, dtype = layout_and_dtype
    w = WeightFields(*fields)
    columns = w.in_features if w.perm is None else w.perm.shape[0]
    compute = dtype if dtype in DTYPE_CODES else torch.float32
    dense = _dense(_weight(w), w.qweight, 0, w.out_features, columns, compute)
    return by_channel(dense, w.perm, w.in_features).to(dtype).contiguous().t()


def look_up(ids: Tensor, *layout_and_dtype: Any) -> Tensor:
    """Rows of ``nn.Linear.weight``. ids: int [...] -> [..., K] in ``dtype``."""
    *fields, dtype = layout_and_dtype
    w = WeightFields(*fields)
    check_ids(ids, w.qweight.device)
    weight = (w.qweight, w.scales, w.zeros, w.perm)
    rows = layout.rows_at(ids.reshape(-1).long(), *weight, w.bits, w.in_features)
    return rows.to(dtype).contiguous().view(*ids.shape, w.in_features)


_LAYOUT = Layout(WeightFields)
KERNEL = Kernel(
    "cuda",
    supports,
    layout.prepare,
    layout.unprepare,
    _LAYOUT,
    gemm,
    *define_operators("cuda_", _LAYOUT, gemm, dequantize, look_up, dispatch="CUDA", by_output=True),
)
