"""The ``cuda`` row of the kernel table: CUDA C++ kernels for NVIDIA GPUs (csrc/cuda).

Which kernel multiplies, and how it cuts the work, is a :class:`Plan`; the weight is as cuda_layout.py prepares it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ...format.weight import LinearSpec
from ..operators import check_input, check_prepared, define_operators
from ..slots import Tensors
from .layout import STRIP

_cuda: Any
try:
    _cuda = importlib.import_module("gptq_backend._cuda")
except ImportError as error:
    _cuda = None
    _MISSING = (
        f"the CUDA extension is not there ({error}); install nvcc, and then gptq-backend again with pip's options "
        "--no-cache-dir --force-reinstall --no-deps"
    )

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Largest dense slice that exists at a time: one that a second-level cache holds would leave multiprocessors idle.
_DENSE_ELEMENTS = 1 << 26

_LAYOUT = "Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm, int in_features, int out_features, int bits"


def supports(spec: LinearSpec, device: torch.device) -> str | None:
    """``None``, or why these kernels cannot serve the layer."""
    if device.type != "cuda" or torch.version.hip is not None:
        return "serves NVIDIA GPUs"
    if _cuda is None:
        return _MISSING
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if reason := _unfit(torch.cuda.current_device() if device.index is None else device.index):
        return reason
    if spec.scales_dtype not in _DTYPES:
        return f"{spec.scales_dtype} scales"
    return None


@functools.cache
def _unfit(index: int) -> str | None:
    """Why the extension does not run on a device, or None."""
    with torch.cuda.device(index):
        return _cuda.unfit(index) or None


# -- how to multiply ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Plan:
    """Which kernel of csrc/cuda/kernels.cuh, and how it cuts the work.

    Args:
        strips: of 16 output channels per block of the skinny kernel; 0 for the wide kernel, whose blocks have 8.
        tokens: blocks of 8 tokens that a block multiplies by at once.
        warps: per block of the skinny kernel, sharing K.
        splits: of K over blocks of the wide kernel.
    """

    strips: int
    tokens: int
    warps: int = 8
    splits: int = 1


# Up to these rows of x: the skinny kernel with 1 and 2 blocks of tokens, the wide kernel. Beyond, the weight is
# dequantized for cuBLAS. Estimates, not measured: `make bench-gpu` prints what they should be.
_SKINNY, _SKINNY2, _WIDE = 8, 16, 128
_SPLIT_COST = 0.02  # share of the time that each further split adds, for partial sums


@functools.lru_cache(4096)
def plan(rows: int, out_features: int, tiles: int, bits: int, processors: int, shared_bytes: int) -> Plan | None:
    """The kernel for x [rows, K]; None: through the dense weight.

    tiles: K / 64, rounded up with each group's padding. processors: multiprocessors of the GPU. shared_bytes: shared
    memory that a block may have.
    """
    strips = math.ceil(out_features / STRIP)
    if rows <= _SKINNY2:
        # Enough warps to keep loads under way everywhere: a block's share K when there are few blocks.
        one = strips < 6 * processors and rows <= _SKINNY
        return Plan(1 if one else 2, 1 if rows <= _SKINNY else 2, 16 if one and strips < processors else 8)
    if rows > _WIDE:
        return None
    tokens = 4 if rows <= 32 else 8
    while _wide_bytes(bits, tokens) > shared_bytes:
        tokens //= 2
    blocks = math.ceil(strips / 8) * math.ceil(rows / (tokens * 8))

    def waves(splits: int) -> float:
        """Time in units of a whole sum over K by one block, a multiprocessor having one at a time."""
        return math.ceil(blocks * splits / processors) / splits * (1 + _SPLIT_COST * (splits - 1))

    return Plan(0, tokens, splits=min(range(1, max(1, min(16, math.ceil(tiles / 2) // 4)) + 1), key=waves))


def _wide_bytes(bits: int, tokens: int) -> int:
    """Shared memory of a block of the wide kernel: three stages of activations and weights (kernels.cuh)."""
    return 3 * (2 * 64 * tokens * 8 * 2 + 8 * 2 * 128 * bits)


@functools.cache
def machine(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and the shared memory that a block may have."""
    if device.type == "cpu":  # the emulator of the tests
        return 4, 227 << 10
    properties = torch.cuda.get_device_properties(device)
    # torch < 2.7 does not tell: what every architecture but 7.5 has.
    limit = getattr(properties, "shared_memory_per_block_optin", 64 << 10 if properties.major < 8 else 99 << 10)
    return properties.multi_processor_count, limit


@functools.cache
def _multiplies(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether the device has matrix units for ``dtype``; the rest goes through the dense weight."""
    if dtype == torch.bfloat16:
        return device.type == "cpu" or torch.cuda.get_device_capability(device) >= (8, 0)
    return dtype == torch.float16


# -- operators ---------------------------------------------------------------------------------------------------------


def _where(x: Tensor) -> tuple[int, int]:
    """Device index and stream handle."""
    if not x.is_cuda:
        return 0, 0
    return x.device.index, torch._C._cuda_getCurrentRawStream(x.device.index)


def _on(x: Tensor) -> Any:
    """torch's runtime and ours must agree on the current device."""
    if x.is_cuda and x.device.index != torch.cuda.current_device():
        return torch.cuda.device(x.device)
    return contextlib.nullcontext()


def _weight(qweight: Tensor, scales: Tensor, zeros: Tensor | None, out_features: int, bits: int) -> Any:
    return _cuda.Weight(
        qweight.data_ptr(),
        scales.data_ptr(),
        _DTYPES[scales.dtype],
        0 if zeros is None else zeros.data_ptr(),
        bits,
        out_features,
        qweight.shape[0],
        qweight.shape[1],
        scales.shape[1],
    )


def _gather(x: Tensor, perm: Tensor) -> Tensor:
    """x [rows, K] in slot order."""
    y = x.new_empty((x.shape[0], perm.shape[0]))
    index, stream = _where(x)
    _cuda.gather(index, x.data_ptr(), *x.shape, x.element_size(), perm.data_ptr(), perm.shape[0], y.data_ptr(), stream)
    return y


def _dense(weight: Any, like: Tensor, first: int, channels: int, columns: int, dtype: torch.dtype) -> Tensor:
    """[channels, columns] of the weight in slot order."""
    dense = torch.empty((channels, columns), dtype=dtype, device=like.device)
    index, stream = _where(like)
    _cuda.dequantize(index, weight, first, channels, columns, dense.data_ptr(), _DTYPES[dtype], stream)
    return dense


def gemm(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    bias: Tensor | None,
) -> Tensor:
    """``x @ W.T + bias``. x: float [..., K] -> [..., N] in the dtype of x. Other arguments: see the module.

    Few rows in 16 bits meet exact codes, with sums and scales in float32. Many rows, float32 and float64 go through a
    weight rounded to the dtype of x (float64: to float32) and cuBLAS.

    Raises:
        ValueError: see ``check_input`` and ``check_prepared``.
    """
    check_prepared(qweight)
    check_input(x, qweight.device, in_features, out_features, bias)
    y = x.new_empty((*x.shape[:-1], out_features))
    rows = x.numel() // in_features
    if not y.numel():
        return y
    how = None
    if _multiplies(x.dtype, x.device):
        how = plan(rows, out_features, qweight.shape[1], bits, *machine(x.device))
    with _on(x):
        weight = _weight(qweight, scales, zeros, out_features, bits)
        compute = x.dtype if x.dtype in _DTYPES else torch.float32
        x2 = x.reshape(rows, in_features).to(compute).contiguous()
        if perm is not None:
            x2 = _gather(x2, perm)
        elif x2.data_ptr() % 16:
            x2 = x2.clone()
        if how is None:
            compute_y = y.view(rows, out_features).to(compute)
            _through_dense(x2, weight, bias, compute_y)
            return compute_y.to(x.dtype).view(y.shape)
        if bias is not None:
            bias = (bias if bias.dtype in _DTYPES else bias.float()).contiguous()
        partials = None
        if how.splits > 1:
            partials = torch.empty((how.splits, rows, out_features), dtype=torch.float32, device=x.device)
        index, stream = _where(x)
        _cuda.multiply(
            index,
            weight,
            x2.data_ptr(),
            _DTYPES[x.dtype],
            *x2.shape,
            0 if bias is None else bias.data_ptr(),
            0 if bias is None else _DTYPES[bias.dtype],
            y.data_ptr(),
            0 if partials is None else partials.data_ptr(),
            how.strips,
            how.tokens,
            how.warps,
            how.splits,
            stream,
        )
    return y


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


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    in_features: int,
    out_features: int,
    bits: int,
    dtype: torch.dtype,
) -> Tensor:
    """Dense weight [K, N] in ``dtype``, the transpose of ``nn.Linear.weight``, which is how it lies in memory."""
    columns = in_features if perm is None else perm.shape[0]
    with _on(qweight):
        weight = _weight(qweight, scales, zeros, out_features, bits)
        dense = _dense(weight, qweight, 0, out_features, columns, dtype if dtype in _DTYPES else torch.float32)
    if perm is not None:
        # Padding lands in one more column, so that nothing has to be counted on the host.
        channel = torch.where((perm >= 0) & (perm < in_features), perm, in_features).long()
        by_channel = torch.empty((out_features, in_features + 1), dtype=dense.dtype, device=dense.device)
        dense = by_channel.index_copy_(1, channel, dense)[:, :in_features]
    return dense.to(dtype).contiguous().t()


_library = torch.library.Library("gptq_backend", "FRAGMENT")
_op = define_operators(
    _library,
    "cuda_",
    _LAYOUT,
    gemm,
    dequantize,
    dispatch="CUDA",
    by_output=True,
)


def arguments(spec: LinearSpec, prepared: Tensors) -> tuple[Any, ...]:
    """The layout, as the operators take it."""
    tensors = (prepared["qweight"], prepared["scales"], prepared.get("zeros"), prepared.get("perm"))
    return (*tensors, spec.in_features, spec.out_features, spec.bits)


def _call(function: Any, spec: LinearSpec, prepared: Tensors, x: Tensor, bias: Tensor | None) -> Tensor:
    return function(x, *arguments(spec, prepared), bias)


apply: Any = functools.partial(_call, gemm)
op: Any = functools.partial(_call, _op)
