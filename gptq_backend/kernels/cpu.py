"""The ``cpu`` and ``cpu_w4a8`` rows of the kernel table: C++ kernels (csrc/cpu), the layout in docs/kernels.md.

Prepared tensors, with K, N, G as in docs/format.md and "slots" as in slots.py:

    qweight int32 [ceil(N/16), slots*bits/32, 16]; scales [ceil(N/16), G, 16] in the checkpoint's dtype;
    zeros uint8 [ceil(N/16), G, 16] unless all are 2**(bits-1); perm int32 [slots], the channel of each slot (>= K for
    padding), unless slot = channel; blocks int32 [blocks, 3]: first slot, end slot, group.
"""

from __future__ import annotations

import ctypes
import functools
import importlib
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..format import packing
from ..format.weight import LinearSpec, unpack_zeros
from .operators import check_input, check_prepared, define_operators
from .slots import Tensors, group_slots, kept, pack_channels, source_channels, stored

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
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

_LAYOUT = (
    "Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm, Tensor blocks, "
    "int in_features, int out_features, int bits, bool a8"
)


class _Layout(NamedTuple):
    """The arguments of that schema; of experts, the tensors have a leading dimension."""

    qweight: Tensor
    scales: Tensor
    zeros: Tensor | None
    perm: Tensor | None
    blocks: Tensor
    in_features: int
    out_features: int
    bits: int
    a8: bool


def supports(spec: LinearSpec, device: torch.device) -> str | None:
    """``None``, or why these kernels cannot serve the layer."""
    if device.type != "cpu":
        return "serves CPUs"
    if _cpu is None:
        return _MISSING
    if spec.scales_dtype not in _DTYPES:
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


def _strips(rows: Tensor) -> Tensor:
    """[G, N] -> [ceil(N/16), G, 16], padded with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % _STRIP))
    return padded.view(rows.shape[0], -1, _STRIP).transpose(0, 1).contiguous()


def _rows(strips: Tensor, width: int) -> Tensor:
    """Undo :func:`_strips`."""
    return strips.transpose(0, 1).reshape(strips.shape[1], -1)[:, :width].contiguous()


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


def prepare(spec: LinearSpec, tensors: Tensors) -> Tensors:
    """Checkpoint tensors -> the tensors above."""
    g_idx = tensors["g_idx"] if spec.act_order else None
    perm, sizes, slots = group_slots(spec, g_idx, _run(spec.bits), 32)
    source = packing.to_int32_words(tensors["qweight"], 0).contiguous()
    if spec.bits == 3:  # codes that cross words, or planes
        source = packing.unpack(source, 3, source_channels(spec), spec.planar).contiguous()
    strips = math.ceil(spec.out_features / _STRIP)
    words = torch.empty((strips, slots * spec.bits // 32, _STRIP), dtype=torch.int32)
    _repack(_cpu.pack, source, words, perm, spec.bits)
    prepared = {"qweight": words, "scales": _strips(tensors["scales"]), "blocks": _blocks(sizes)}
    if not spec.sym:
        prepared["zeros"] = _strips(unpack_zeros(spec, tensors["qzeros"]))
    if perm is not None:
        prepared["perm"] = perm
    return prepared | kept(tensors)


def unprepare(spec: LinearSpec, prepared: Tensors) -> Tensors:
    """The checkpoint tensors again, bit for bit."""
    if spec.bits == 3:
        codes = torch.empty((source_channels(spec), spec.out_features), dtype=torch.uint8)
        _repack(_cpu.unpack, codes, prepared["qweight"], prepared.get("perm"), spec.bits)
        words = pack_channels(spec, codes)
    else:
        count = math.ceil(spec.shapes["qweight"][0] * spec.word_dtype.itemsize / 4)
        words = torch.empty((count, spec.out_features), dtype=torch.int32)
        _repack(_cpu.unpack, words, prepared["qweight"], prepared.get("perm"), spec.bits)
    return stored(spec, words, _rows(prepared["scales"], spec.out_features), prepared)


# -- operators ---------------------------------------------------------------------------------------------------------


def gemm(
    x: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    blocks: Tensor,
    in_features: int,
    out_features: int,
    bits: int,
    a8: bool,
    bias: Tensor | None,
) -> Tensor:
    """``x @ W.T + bias``. x: float [..., K] -> [..., N] in the dtype of x; float64 goes through the dense weight.

    a8: activations become int8 with a scale per token and block (8 bits of precision), in place of int16 (float32:
    two of them). Other arguments: see the module.

    Raises:
        ValueError: see ``check_input`` and ``check_prepared``.
    """
    check_prepared(qweight)
    check_input(x, qweight.device, in_features, out_features, bias)
    if x.dtype not in _DTYPES:
        y = x @ dequantize(qweight, scales, zeros, perm, blocks, in_features, out_features, bits, a8, x.dtype)
        return y if bias is None else y + bias.to(x.dtype)
    y = x.new_empty((*x.shape[:-1], out_features))
    layout = (qweight, scales, zeros, perm, blocks, in_features, out_features, bits, a8)
    _multiply(_cpu.gemm, x, x.numel() // in_features, layout, bias, y)
    return y


def moe_gemm(x: Tensor, *layout_and_more: Any) -> Tensor:
    """Each row of x times the weights of its expert: see ``moe.MoeKernel``.

    After the layout, whose tensors have a leading dimension, come ids [rows], the number of experts, top_k and bias.

    Raises:
        ValueError: see ``check_input``; or x is float64, or the shapes of x, ids and bias do not fit together.
    """
    *layout, ids, experts, top_k, bias = layout_and_more
    w = _Layout(*layout)
    check_input(x, w.qweight.device, w.in_features, w.out_features, None)
    rows, parts = ids.numel(), w.qweight.shape[0] // experts
    fits = x.dtype in _DTYPES and x.dim() == 2 and x.shape[0] * top_k == rows
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


def _multiply(
    function: Any, x: Tensor, rows: int, layout: Sequence[Any], bias: Tensor | None, y: Tensor, *more: int
) -> None:
    qweight, scales, zeros, perm, blocks, in_features, out_features, bits, a8 = layout
    if bias is not None:
        bias = (bias if bias.dtype in _DTYPES else bias.float()).contiguous()
    x = x.contiguous()
    function(
        x.data_ptr(),
        _DTYPES[x.dtype],
        rows,
        qweight.data_ptr(),
        scales.data_ptr(),
        _DTYPES[scales.dtype],
        0 if zeros is None else zeros.data_ptr(),
        0 if perm is None else perm.data_ptr(),
        blocks.data_ptr(),
        bits,
        in_features,
        out_features,
        qweight.shape[-2] * 32 // bits,
        scales.shape[-2],
        blocks.shape[-2],
        0 if bias is None else bias.data_ptr(),
        0 if bias is None else _DTYPES[bias.dtype],
        y.data_ptr(),
        a8,
        torch.get_num_threads(),
        *more,
    )


def dequantize(
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    perm: Tensor | None,
    blocks: Tensor,
    in_features: int,
    out_features: int,
    bits: int,
    a8: bool,
    dtype: torch.dtype,
) -> Tensor:
    """Dense weight [K, N] in ``dtype``, the transpose of ``nn.Linear.weight``; a8 concerns activations only."""
    codes = torch.empty((in_features, out_features), dtype=torch.uint8)
    _repack(_cpu.unpack, codes, qweight, perm, bits)
    first, end, group = blocks.long().unbind(1)
    of_slot = torch.zeros(qweight.shape[1] * 32 // bits, dtype=torch.long)
    of_slot[: int(end[-1])] = group.repeat_interleave(end - first)
    if perm is None:
        index = of_slot[:in_features]
    else:
        real = (perm >= 0) & (perm < in_features)
        index = torch.empty(in_features, dtype=torch.long).scatter_(0, perm[real].long(), of_slot[real])
    dense = codes.to(dtype)
    dense -= 1 << (bits - 1) if zeros is None else _rows(zeros, out_features).to(dtype)[index]
    return dense.mul_(_rows(scales, out_features).to(dtype)[index])


def _moe_gemm_fake(x: Tensor, *arguments: Any) -> Tensor:
    *layout, ids, experts, _, _ = arguments
    w = _Layout(*layout)
    return x.new_empty((ids.numel(), w.qweight.shape[0] // experts * w.out_features))


def _torch_functions() -> dict[str, int]:
    """Addresses of what csrc/cpu/torch_op.cpp calls; none where torch lacks one of them, as before 2.10."""
    if _cpu is None:
        return {}
    symbols = ctypes.CDLL(torch._C.__file__)  # finds those of libtorch, which it is linked to
    try:
        return {name: ctypes.cast(symbols[name], ctypes.c_void_p).value or 0 for name in _cpu.torch_functions()}
    except AttributeError:
        return {}


# With them the operator for inference is one in C++, which takes a fraction of the time that one in Python takes.
_FUNCTIONS = _torch_functions()
_library = torch.library.Library("gptq_backend", "FRAGMENT")
_op = define_operators(
    _library,
    "cpu_",
    _LAYOUT,
    gemm,
    dequantize,
    dispatch="CPU",
    register_inference=(lambda name: _cpu.register_with_torch(name, _FUNCTIONS)) if _FUNCTIONS else None,
)
_library.define(f"cpu_moe_gemm(Tensor x, {_LAYOUT}, Tensor ids, int experts, int top_k, Tensor? bias) -> Tensor")
_library.impl("cpu_moe_gemm", moe_gemm, "CPU")
torch.library.register_fake("gptq_backend::cpu_moe_gemm", _moe_gemm_fake, lib=_library)


def arguments(spec: LinearSpec, prepared: Tensors, a8: bool) -> tuple[Any, ...]:
    """The layout, as the operators take it."""
    tensors = (prepared["qweight"], prepared["scales"], prepared.get("zeros"), prepared.get("perm"), prepared["blocks"])
    return (*tensors, spec.in_features, spec.out_features, spec.bits, a8)


def _infer(*arguments: Any) -> Tensor:
    try:
        return torch.ops.gptq_backend.cpu_gemm_inference.default(*arguments)
    except RuntimeError:
        return gemm(*arguments)  # says what is wrong, which is lost on the way through C++


def _call(function: Any, a8: bool, spec: LinearSpec, prepared: Tensors, x: Tensor, bias: Tensor | None) -> Tensor:
    return function(x, *arguments(spec, prepared, a8), bias)


apply: Any = functools.partial(_call, _infer if _FUNCTIONS else gemm, False)
op: Any = functools.partial(_call, _op, False)
apply_w4a8: Any = functools.partial(_call, _infer if _FUNCTIONS else gemm, True)
op_w4a8: Any = functools.partial(_call, _op, True)
