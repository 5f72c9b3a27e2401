"""The ``cpu`` and ``cpu_w4a8`` rows of the kernel table: C++ kernels (csrc/cpu), the layout in docs/kernels.md.

Prepared tensors, with K, N, G as in docs/format.md and "slots" as in slots.py:

    qweight int32 [ceil(N/16), slots*bits/32, 16]; scales [ceil(N/16), G, 16] in the checkpoint's dtype;
    zeros uint8 [ceil(N/16), G, 16] unless all are 2**(bits-1); perm int32 [slots], the channel of each slot (>= K for
    padding), unless slot = channel; blocks int32 [blocks, 3]: first slot, end slot, group.
"""

from __future__ import annotations

import ctypes
import importlib
import math
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..format import packing
from ..format.weight import PackedWeight, WeightSpec
from .devices import DTYPE_CODES
from .expert_routing import Routing
from .interface import ExpertKernel, Kernel, Layout, Tensors
from .operators import check_ids, check_input, check_prepared, define_grouped, define_operators
from .slots import group_slots, rows_of, strips

_cpu: Any
try:
    _cpu = importlib.import_module("gptq_backend._cpu")
except ImportError as error:
    _cpu = None
    _MISSING = (
        f"the native extension is not there ({error}); install g++ or clang++, and then gptq-backend again with pip's "
        "options --no-cache-dir --force-reinstall --no-deps"  # or pip takes the wheel that it made without
    )

_STRIP = 16
# A block shares one activation scale; csrc/cpu/kernel.h has the reason for the limit.
_MAX_BLOCK = 128


class WeightFields(NamedTuple):
    """What describes a weight to the operators; of experts, the tensors have a leading dimension.

    a8: activations become int8 with a scale per token and block (8 bits of precision), in place of int16 (float32: two
    of them).
    """

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    blocks: Tensor
    in_features: int
    out_features: int
    bits: int
    a8: bool


def supports(spec: WeightSpec, device: torch.device) -> str | None:
    """``None``, or why these kernels cannot serve the layer."""
    if device.type != "cpu":
        return "serves CPUs"
    if _cpu is None:
        return _MISSING
    if spec.scales_dtype not in DTYPE_CODES:
        return f"{spec.scales_dtype} scales"
    return None


def in_huge_pages(empty: Tensor) -> Tensor:
    """A tensor to which nothing was written yet, in pages of 2 MB where it is large, on a CPU, and Linux allows it."""
    if empty.is_cpu and _cpu is not None:
        _cpu.advise_huge_pages(empty.data_ptr(), empty.nbytes)
    return empty


# -- layout ------------------------------------------------------------------------------------------------------------


def _run(bits: int) -> int:
    """Codes of a channel that are packed together: blocks are multiples of it."""
    return 32 if bits == 3 else 32 // bits


def _blocks(sizes: Tensor) -> Tensor:
    """int32 [blocks, 3]. sizes: slots of each group."""
    ends = sizes.cumsum(0)
    blocks = [
        (first, min(first + _MAX_BLOCK, end), group)
        for group, (start, end) in enumerate(zip((ends - sizes).tolist(), ends.tolist()))
        for first in range(start, end, _MAX_BLOCK)
    ]
    return torch.tensor(blocks, dtype=torch.int32).view(-1, 3)


def _repack(function: Any, source: Tensor, words: Tensor, perm: Tensor | None, spec_bits: int) -> None:
    """``source``: int32 words [rows, N] of the checkpoint, or uint8 codes [channels, N]."""
    function(
        source.data_ptr(),
        source.shape[0],
        source.itemsize * 8,
        8 if source.dtype == torch.uint8 else spec_bits,
        words.data_ptr(),
        0 if perm is None else perm.data_ptr(),
        spec_bits,
        source.shape[1],
        words.shape[1] * 32 // spec_bits,
        torch.get_num_threads(),
    )


def prepare(weight: PackedWeight) -> Tensors:
    """The tensors above; see ``Kernel``."""
    spec, source = weight.spec, weight.qweight.contiguous()
    perm, sizes, slots = group_slots(weight, _run(spec.bits), 32)
    if spec.bits == 3:  # codes that cross words
        source = packing.unpack(source, 3, weight.channels).contiguous()
    words = torch.empty((math.ceil(spec.out_features / _STRIP), slots * spec.bits // 32, _STRIP), dtype=torch.int32)
    _repack(_cpu.pack, source, words, perm, spec.bits)
    prepared = {"qweight": words, "scales": strips(weight.scales, _STRIP), "blocks": _blocks(sizes)}
    if not spec.sym:
        prepared["zeros"] = strips(weight.zeros, _STRIP)
    if perm is not None:
        prepared["perm"] = perm
    return prepared


def unprepare(spec: WeightSpec, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor | None]:
    """See ``Kernel``."""
    words, perm, zeros = tensors["qweight"], tensors.get("perm"), tensors.get("zeros")
    channels = words.shape[1] * 32 // spec.bits if perm is None else int((perm >= 0).sum())
    if spec.bits == 3:
        codes = torch.empty((channels, spec.out_features), dtype=torch.uint8)
        _repack(_cpu.unpack, codes, words, perm, spec.bits)
        qweight = packing.pack(codes, spec.bits)
    else:
        qweight = torch.empty((packing.words_for(channels, spec.bits), spec.out_features), dtype=torch.int32)
        _repack(_cpu.unpack, qweight, words, perm, spec.bits)
    scales = rows_of(tensors["scales"], spec.out_features)
    return qweight, scales, None if zeros is None else rows_of(zeros, spec.out_features)


# -- operators ---------------------------------------------------------------------------------------------------------


def gemm(x: Tensor, *layout_and_bias: Any) -> Tensor:
    """``x @ W.T + bias``. x: float [..., K] -> [..., N] in the dtype of x; float64 goes through the dense weight.

    Raises:
        ValueError: see ``check_input`` and ``check_prepared``.
    """
    *layout, bias = layout_and_bias
    w = WeightFields(*layout)
    check_prepared(w.qweight)
    check_input(x, w.qweight.device, w.in_features, w.out_features, bias)
    if x.dtype not in DTYPE_CODES:
        y = x @ dequantize(*w, x.dtype)
        return y if bias is None else y + bias.to(x.dtype)
    y = x.new_empty((*x.shape[:-1], w.out_features))
    _multiply(_cpu.gemm, x, x.numel() // w.in_features, w, bias, y)
    return y


def moe_gemm(x: Tensor, *layout_and_more: Any) -> Tensor:
    """Each row of x times the weights of its expert: see ``ExpertKernel``.

    After the layout, whose tensors have a leading dimension, come ids [rows], the number of experts, top_k and bias.

    Raises:
        ValueError: see ``check_input``; or x is float64, or the shapes of x, ids and bias do not fit together.
    """
    *layout, ids, experts, top_k, bias = layout_and_more
    w = WeightFields(*layout)
    check_input(x, w.qweight.device, w.in_features, w.out_features, None)
    rows, parts = ids.numel(), w.qweight.shape[0] // experts
    fits = x.dtype in DTYPE_CODES and x.dim() == 2 and x.shape[0] * top_k == rows
    if not fits or ids.dtype not in (torch.int32, torch.int64) or not ids.is_cpu:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} and ids is {ids.dtype} {tuple(ids.shape)} on {ids.device}, expected "
            f"16 bits or float32 [rows, {w.in_features}] and int32 or int64 [rows * {top_k}] on the CPU"
        )
    if bias is not None and bias.shape != (w.qweight.shape[0], w.out_features):
        raise ValueError(f"bias is {tuple(bias.shape)}, expected ({w.qweight.shape[0]}, {w.out_features})")
    y = x.new_empty((rows, parts * w.out_features))
    ids = ids.contiguous()
    _multiply(_cpu.moe_gemm, x, rows, w, bias, y, ids.data_ptr(), ids.itemsize, experts, parts, top_k)
    return y


def gradient(y_grad: Tensor, *layout: Any) -> Tensor:
    """``y_grad @ W``, the gradient of x. y_grad: float [..., N] -> [..., K] in its dtype; float64 goes through the
    dense weight. Activations that are int8 in the product count as what they were before.

    Raises:
        ValueError: see ``check_input`` and ``check_prepared``.
    """
    w = WeightFields(*layout)
    check_prepared(w.qweight)
    check_input(y_grad, w.qweight.device, w.out_features, w.in_features, None)
    if y_grad.dtype not in DTYPE_CODES:
        return y_grad @ dequantize(*w, y_grad.dtype).t()
    x_grad = y_grad.new_empty((*y_grad.shape[:-1], w.in_features))
    y_grad = y_grad.contiguous()
    rows = y_grad.numel() // w.out_features
    _cpu.gradient(
        y_grad.data_ptr(),
        DTYPE_CODES[y_grad.dtype],
        rows,
        *addresses(w),
        x_grad.data_ptr(),
        torch.get_num_threads(),
    )
    return x_grad


def addresses(layout: WeightFields) -> tuple[int, ...]:
    """What C++ takes for a weight."""
    qweight, scales, zeros, perm, blocks, in_features, out_features, bits, _ = layout
    return (
        qweight.data_ptr(),
        scales.data_ptr(),
        DTYPE_CODES[scales.dtype],
        0 if zeros is None else zeros.data_ptr(),
        0 if perm is None else perm.data_ptr(),
        blocks.data_ptr(),
        bits,
        in_features,
        out_features,
        qweight.shape[-2] * 32 // bits,
        scales.shape[-2],
        blocks.shape[-2],
    )


def _multiply(
    function: Any, x: Tensor, rows: int, layout: WeightFields, bias: Tensor | None, y: Tensor, *more: int
) -> None:
    if bias is not None:
        bias = (bias if bias.dtype in DTYPE_CODES else bias.float()).contiguous()
    x = x.contiguous()
    function(
        x.data_ptr(),
        DTYPE_CODES[x.dtype],
        rows,
        *addresses(layout),
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else DTYPE_CODES[bias.dtype],
        y.data_ptr(),
        layout.a8,
        torch.get_num_threads(),
        *more,
    )


def dequantize(*layout_and_dtype: Any) -> Tensor:
    """Dense weight [K, N] in ``dtype``, the transpose of ``nn.Linear.weight``."""
    *layout, dtype = layout_and_dtype
    qweight, scales, zeros, perm, blocks, in_features, out_features, bits, _ = WeightFields(*layout)
    codes = torch.empty((in_features, out_features), dtype=torch.uint8)
    _repack(_cpu.unpack, codes, qweight, perm, bits)
    # The group of each slot, and from there of each channel.
    first, end, group = blocks.long().unbind(1)
    of_slot = torch.zeros(qweight.shape[1] * 32 // bits, dtype=torch.long)
    of_slot[: int(end[-1])] = group.repeat_interleave(end - first)
    if perm is None:
        index = of_slot[:in_features]
    else:
        real = (perm >= 0) & (perm < in_features)
        index = torch.empty(in_features, dtype=torch.long).scatter_(0, perm[real].long(), of_slot[real])
    dense = codes.to(dtype)
    dense -= 1 << (bits - 1) if zeros is None else rows_of(zeros, out_features).to(dtype)[index]
    return dense.mul_(rows_of(scales, out_features).to(dtype)[index])


def look_up(ids: Tensor, *layout_and_dtype: Any) -> Tensor:
    """Rows of ``nn.Linear.weight``. ids: int [...] -> [..., K] in ``dtype``.

    Raises:
        ValueError: see ``check_ids`` and ``check_prepared``. IndexError: there is no such row.
    """
    *layout, dtype = layout_and_dtype
    w = WeightFields(*layout)
    check_prepared(w.qweight)
    check_ids(ids, w.qweight.device)
    numbers = ids.long().contiguous()
    rows = torch.empty((*ids.shape, w.in_features), dtype=dtype if dtype in DTYPE_CODES else torch.float32)
    code, threads = DTYPE_CODES[rows.dtype], torch.get_num_threads()
    _cpu.look_up(numbers.data_ptr(), ids.numel(), *addresses(w), rows.data_ptr(), code, threads)
    return rows.to(dtype)


def _torch_functions() -> dict[str, int]:
    """Addresses of what csrc/cpu/torch_op.cpp calls; none where torch lacks one of them, as before 2.10."""
    if _cpu is None:
        return {}
    # It finds those of libtorch, which it is linked to. Not so on Windows, where that is as well: an exception of the
    # operator cannot pass through torch, which another compiler has built.
    symbols = ctypes.CDLL(torch._C.__file__)
    try:
        return {name: ctypes.cast(symbols[name], ctypes.c_void_p).value or 0 for name in _cpu.torch_functions()}
    except AttributeError:
        return {}


_FUNCTIONS = _torch_functions()
# With them operators for inference are in C++, which takes a fraction of the time that they take in Python.
register_inference = (lambda name: _cpu.register_with_torch(name, _FUNCTIONS)) if _FUNCTIONS else None
_LAYOUT, _LAYOUT_A8 = (Layout(WeightFields, constants=(a8,)) for a8 in (False, True))
_OPERATORS = define_operators(
    "cpu_",
    _LAYOUT,
    gemm,
    dequantize,
    look_up,
    dispatch="CPU",
    gradient=gradient,
    register_inference=register_inference,
)
_moe_op = define_grouped(
    "cpu_moe_gemm",
    _LAYOUT,
    "Tensor ids, int experts, int top_k, Tensor? bias",
    moe_gemm,
    lambda x, w, ids, experts, *_: (ids.numel(), w.qweight.shape[0] // experts * w.out_features),
    dispatch="CPU",
)


def _infer(*arguments: Any) -> Tensor:
    try:
        return torch.ops.gptq_backend.cpu_gemm_inference.default(*arguments)
    except RuntimeError:
        return gemm(*arguments)  # says what is wrong, which is lost on the way through C++


# -- rows of the kernel table ------------------------------------------------------------------------------------------


def _kernel(name: str, layout: Layout, opt_in: bool) -> Kernel:
    return Kernel(name, supports, prepare, unprepare, layout, _infer if _FUNCTIONS else gemm, *_OPERATORS, opt_in)


def _experts(kernel: Kernel) -> ExpertKernel:
    def call(
        function: Any, x: Tensor, layout: tuple[Any, ...], routing: Routing, top_k: int, bias: Tensor | None
    ) -> Tensor:
        return function(x, *layout, routing.ids, routing.experts, top_k, bias)

    def allocate(like: Tensor, shape: tuple[int, ...]) -> Tensor:
        return in_huge_pages(like.new_empty(shape))

    names = ("qweight", "scales", "zeros", "perm", "blocks")
    return ExpertKernel(kernel, names, partial(call, moe_gemm), partial(call, _moe_op), allocate)


KERNEL, W4A8 = _kernel("cpu", _LAYOUT, opt_in=False), _kernel("cpu_w4a8", _LAYOUT_A8, opt_in=True)
EXPERTS, W4A8_EXPERTS = _experts(KERNEL), _experts(W4A8)
