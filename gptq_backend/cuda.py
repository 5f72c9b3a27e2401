"""The ``cuda`` row of the kernel table: CUDA C++ kernels for NVIDIA GPUs (csrc/cuda), the layout in docs/kernels.md.

Prepared tensors, with K, N, G as in docs/format.md and "slots" as in slots.py:

    qweight int32 [ceil(N/16), tiles, 32*bits]: a tile is 16 output channels by 64 slots; scales in the checkpoint's
    dtype [ceil(N/16), chunks, 16], and zeros uint8 alike unless all are 2**(bits-1): a chunk is the slots that share a
    scale, and all chunks have the same number of slots; perm int32 [slots], the channel of each slot (>= K for the bits
    that only fill the checkpoint's last words, negative for padding), unless slot = channel.

``qzeros`` and ``g_idx`` are kept as they were, and so are the scales (``stored_scales``) in the rare case of a group
without channels: they are small, and the way back is exact.
"""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import packing
from .gradients import register_gradients
from .slots import group_slots, source_channels
from .weight import LinearSpec, unpack_zeros

Tensors = dict[str, Tensor]

_cuda: Any
try:
    from . import _cuda  # type: ignore[attr-defined, no-redef]
except ImportError as error:
    _cuda, _MISSING = None, f"the CUDA extension is not there ({error}); install again on a machine with nvcc"

_STRIP, _TILE, _UNIT = 16, 64, 32
_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
# Largest dense slice that exists at a time: one that a second-level cache holds would leave multiprocessors idle.
_DENSE_ELEMENTS = 1 << 26

_ARGS = "Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm, int in_features, int out_features, int bits"
_library = torch.library.Library("gptq_backend", "FRAGMENT")
_library.define(f"cuda_gemm(Tensor x, {_ARGS}, Tensor? bias) -> Tensor")
_library.define(f"cuda_dequantize({_ARGS}, ScalarType dtype) -> Tensor")


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


# -- layout ------------------------------------------------------------------------------------------------------------


def _planes(bits: int) -> tuple[tuple[int, int], ...]:
    """(width, lowest bit) of the parts of a code that lie in separate words."""
    return ((2, 0), (1, 2)) if bits == 3 else ((bits, 0),)


def _shifts(width: int, device: torch.device) -> Tensor:
    """Where each code of a word begins: one shift and one mask then yield two 16-bit lanes (tiles.cuh)."""
    code = torch.arange(32 // width, device=device)
    # The 1-bit plane meets the other at bit 2.
    return (width * (code // 2) + 16 * (code % 2) + (2 if width == 1 else 0)) % 32


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [slots, N], both whole tiles -> int32 [strips, tiles, 32*bits]."""
    slots, channels = codes.shape
    # slot = (tile, unit 2, t 4, c 8), channel = (strip, half 2, g 8) -> lane (g, t), its codes ordered (half, unit, c)
    lanes = codes.view(slots // _TILE, 2, 4, 8, channels // _STRIP, 2, 8).permute(4, 0, 6, 2, 5, 1, 3)
    lanes = lanes.reshape(channels // _STRIP, slots // _TILE, 32, 32)
    parts = []
    for width, low in _planes(bits):
        fields = (lanes >> low & (1 << width) - 1).unflatten(-1, (width, 32 // width)).int()
        words = (fields << _shifts(width, codes.device).int()).sum(-1, dtype=torch.int32)
        # Vectors of at most four words, each contiguous over the lanes.
        parts.append(words.unflatten(-1, (-1, min(width, 4))).transpose(-2, -3).flatten(-3))
    return torch.cat(parts, -1)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Undo :func:`_pack`."""
    strips, tiles, _ = words.shape
    lanes = torch.zeros((strips, tiles, 32, 32), dtype=torch.uint8, device=words.device)
    first = 0
    for width, low in _planes(bits):
        vector = min(width, 4)
        part = words[..., first : first + 32 * width].reshape(strips, tiles, width // vector, 32, vector)
        fields = part.transpose(-2, -3).flatten(-2).unsqueeze(-1) >> _shifts(width, words.device).int()
        lanes |= ((fields & (1 << width) - 1) << low).flatten(-2).to(torch.uint8)
        first += 32 * width
    codes = lanes.view(strips, tiles, 8, 4, 2, 2, 8).permute(1, 5, 3, 6, 0, 4, 2)
    return codes.reshape(tiles * _TILE, strips * _STRIP)


def _strips(rows: Tensor) -> Tensor:
    """[chunks, N] -> [ceil(N/16), chunks, 16], channels g and g + 8 adjacent, padded with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % _STRIP))
    return padded.view(len(rows), -1, 2, 8).permute(1, 0, 3, 2).flatten(2).contiguous()


def _rows(strips: Tensor, width: int) -> Tensor:
    """Undo :func:`_strips`."""
    return strips.unflatten(2, (8, 2)).permute(1, 0, 3, 2).reshape(strips.shape[1], -1)[:, :width].contiguous()


@dataclass(frozen=True)
class _Slots:
    """The slots of a layer, in chunks of one size.

    Args:
        perm: as above.
        sizes: int64 [G], slots of each group.
        count: of all slots.
        chunk: slots that share a scale.
    """

    perm: Tensor | None
    sizes: Tensor
    count: int
    chunk: int

    @property
    def groups(self) -> Tensor:
        """int64 [chunks]: the group of each, -1 for padding."""
        index = torch.repeat_interleave(torch.arange(len(self.sizes)), self.sizes // self.chunk)
        return torch.nn.functional.pad(index, (0, self.count // self.chunk - len(index)), value=-1)


def _layout(spec: LinearSpec, g_idx: Tensor | None) -> _Slots:
    """Slots of ``spec``, in the chunks that take the fewest bytes. g_idx: int [K] on the CPU, or None."""
    if g_idx is None:
        largest, choices = min(spec.group_size, spec.in_features), set()
    else:  # groups may differ in size: then smaller chunks, with repeated scales, waste fewer slots
        largest, choices = int(torch.bincount(g_idx.long()).max()), {32, 64, 128}
    choices |= {math.ceil(largest / multiple) * multiple for multiple in (_UNIT, _TILE)}

    def slots(chunk: int) -> _Slots:
        perm, sizes, count = group_slots(spec, g_idx, chunk, math.lcm(chunk, _TILE))
        if perm is None and spec.in_features % 8:  # rows of x would not be aligned
            channel = torch.arange(count, dtype=torch.int32)
            perm = torch.where(channel < source_channels(spec), channel, -1)
        return _Slots(perm, sizes, count, chunk)

    def size(layout: _Slots) -> float:
        return layout.count * spec.bits / 8 + layout.count / layout.chunk * (
            spec.scales_dtype.itemsize + (not spec.sym)
        )

    return min((slots(chunk) for chunk in sorted(choices, reverse=True)), key=size)


def prepare(spec: LinearSpec, tensors: Tensors) -> Tensors:
    """Checkpoint tensors -> the tensors above, on the same device."""
    device = tensors["qweight"].device
    layout = _layout(spec, tensors["g_idx"].cpu() if spec.act_order else None)
    groups, perm = layout.groups.to(device), None if layout.perm is None else layout.perm.to(device)

    def by_chunk(rows: Tensor) -> Tensor:
        return _strips(torch.where(groups.unsqueeze(1) >= 0, rows[groups.clamp(min=0)], rows.new_zeros(())))

    words = packing.to_int32_words(tensors["qweight"], 0)
    parts = []
    for columns in _slices(spec, layout.count):
        codes = packing.unpack(words[:, columns], spec.bits, source_channels(spec), spec.planar)
        if perm is None:
            codes = torch.nn.functional.pad(codes, (0, 0, 0, layout.count - len(codes)))
        else:
            codes = codes[perm.clamp(min=0).long()] * (perm >= 0).unsqueeze(1)
        parts.append(_pack(torch.nn.functional.pad(codes, (0, -codes.shape[1] % _STRIP)), spec.bits))
    prepared = {"qweight": torch.cat(parts), "scales": by_chunk(tensors["scales"])}
    if not spec.sym:
        prepared["zeros"] = by_chunk(unpack_zeros(spec, tensors["qzeros"]))
    if perm is not None:
        prepared["perm"] = perm
    if not bool(layout.sizes.all()):
        prepared["stored_scales"] = tensors["scales"]
    return prepared | {name: tensors[name] for name in ("qzeros", "g_idx") if name in tensors}


def unprepare(spec: LinearSpec, prepared: Tensors) -> Tensors:
    """The checkpoint tensors again, bit for bit."""
    channels, perm = source_channels(spec), prepared.get("perm")
    words = prepared["qweight"]
    parts = []
    for columns in _slices(spec, words.shape[1] * _TILE):
        strips = slice(columns.start // _STRIP, math.ceil(columns.stop / _STRIP))
        codes = _unpack(words[strips], spec.bits)[:, : columns.stop - columns.start]
        if perm is not None:
            real = perm >= 0
            codes = torch.empty_like(codes[:channels]).index_copy_(0, perm[real].long(), codes[real])
        codes = codes[:channels]
        if spec.planar and spec.bits == 3:
            codes = torch.nn.functional.pad(codes, (0, 0, 0, -channels % 32))
        parts.append(packing.pack(codes, spec.bits, spec.planar))
    scales = prepared.get("stored_scales")
    if scales is None:
        by_chunk = _rows(prepared["scales"], spec.out_features)
        g_idx = prepared["g_idx"].cpu() if spec.act_order else None
        groups = _layout(spec, g_idx).groups
        first = torch.cat([torch.ones(1, dtype=torch.bool), groups[1:] != groups[:-1]]) & (groups >= 0)
        scales = by_chunk[first.to(by_chunk.device)]
    tensors = {
        "qweight": packing.from_int32_words(torch.cat(parts, 1), spec.word_dtype, 0, spec.shapes["qweight"][0]),
        "qzeros": prepared["qzeros"],
        "scales": scales,
    }
    return tensors | ({"g_idx": prepared["g_idx"]} if "g_idx" in prepared else {})


def _slices(spec: LinearSpec, slots: int) -> list[slice]:
    """Output channels in whole strips, few enough that repacking them takes little memory."""
    step = max(1, (1 << 24) // (slots * _STRIP)) * _STRIP
    return [slice(n, min(n + step, spec.out_features)) for n in range(0, spec.out_features, step)]


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
    strips = math.ceil(out_features / _STRIP)
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
        ValueError: x is not a floating-point tensor with K columns on the device of the weight.
    """
    if x.device != qweight.device or not x.is_floating_point() or x.shape[-1] != in_features:
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} on {x.device}, expected floating point with a last dimension of "
            f"{in_features} on {qweight.device}"
        )
    if bias is not None and (bias.device != x.device or bias.shape != (out_features,)):
        raise ValueError(f"bias is {tuple(bias.shape)} on {bias.device}, expected ({out_features},) on {x.device}")
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
    """Dense weight [N, K] in ``dtype``, as ``nn.Linear.weight``."""
    columns = in_features if perm is None else perm.shape[0]
    with _on(qweight):
        weight = _weight(qweight, scales, zeros, out_features, bits)
        dense = _dense(weight, qweight, 0, out_features, columns, dtype if dtype in _DTYPES else torch.float32)
    if perm is not None:
        # Padding lands in one more column, so that nothing has to be counted on the host.
        channel = torch.where((perm >= 0) & (perm < in_features), perm, in_features).long()
        by_channel = torch.empty((out_features, in_features + 1), dtype=dense.dtype, device=dense.device)
        dense = by_channel.index_copy_(1, channel, dense)[:, :in_features]
    return dense.to(dtype).contiguous()


def _gemm_fake(x, qweight, scales, zeros, perm, in_features, out_features, bits, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


def _dequantize_fake(qweight, scales, zeros, perm, in_features, out_features, bits, dtype):  # type: ignore[no-untyped-def]
    return scales.new_empty((out_features, in_features), dtype=dtype)


_library.impl("cuda_gemm", gemm, "CUDA")
_library.impl("cuda_dequantize", dequantize, "CUDA")
torch.library.register_fake("gptq_backend::cuda_gemm", _gemm_fake, lib=_library)
torch.library.register_fake("gptq_backend::cuda_dequantize", _dequantize_fake, lib=_library)
register_gradients(_library, "gptq_backend::cuda_gemm", torch.ops.gptq_backend.cuda_dequantize)


def _call(function: Any, spec: LinearSpec, prepared: Tensors, x: Tensor, bias: Tensor | None) -> Tensor:
    return function(
        x,
        prepared["qweight"],
        prepared["scales"],
        prepared.get("zeros"),
        prepared.get("perm"),
        spec.in_features,
        spec.out_features,
        spec.bits,
        bias,
    )


apply: Any = functools.partial(_call, gemm)
op: Any = functools.partial(_call, torch.ops.gptq_backend.cuda_gemm)
