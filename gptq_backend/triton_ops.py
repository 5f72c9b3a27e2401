"""The ``triton`` row of the kernel table: Triton kernels for AMD and Intel GPUs, and NVIDIA's without a compiler.

Prepared tensors, with K, N, G as in docs/format.md, "slots" as in slots.py and W = N padded to a multiple of 16:

    qweight int32 [slabs, rows of words, W]: docs/kernels.md has the order; scales [G, W] in the checkpoint's dtype;
    zeros uint8 [G, W] unless all are 2**(bits-1); perm int32 [slots], the channel of each slot (>= K for padding or
    negative), unless slot = channel; groups int32 [slots/16], the group of every 16 slots, unless all groups but the
    last are of ``group_size`` channels.

``qzeros`` and ``g_idx`` are kept as they were: they are small, and the way back is exact. triton is imported with the
first layer that is prepared for a GPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib
import math
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from . import packing
from .gradients import register_gradients
from .slots import group_slots, source_channels
from .weight import LinearSpec, unpack_zeros

Tensors = dict[str, Tensor]

PLANE = 16
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Largest dense slice that exists at a time.
_MAX_DENSE_ELEMENTS = 1 << 26

_ARGS = "Tensor qweight, Tensor scales, Tensor? zeros, Tensor? perm, Tensor? groups"
_NUMBERS = "int in_features, int out_features, int bits, int group_size"
_library = torch.library.Library("gptq_backend", "FRAGMENT")
_library.define(f"triton_gemm(Tensor x, {_ARGS}, {_NUMBERS}, Tensor? bias) -> Tensor")
_library.define(f"triton_dequantize({_ARGS}, {_NUMBERS}, ScalarType dtype) -> Tensor")
_library.define(
    f"triton_moe_gemm(Tensor x, {_ARGS}, {_NUMBERS}, Tensor order, Tensor experts, int top_k, Tensor? bias) -> Tensor"
)


@functools.cache
def _missing() -> str | None:
    """Why triton cannot be used, or None."""
    try:
        importlib.import_module("triton")
    except ImportError as error:
        return f"triton is not there ({error}); pip install triton (Intel GPUs: the build that torch for XPU names)"
    return None


def supports(spec: LinearSpec, device: torch.device) -> str | None:
    """``None``, or why these kernels cannot serve the layer."""
    if device.type not in ("cuda", "xpu"):
        return "serves GPUs"
    if reason := _missing():
        return reason
    if not torch.get_device_module(device).is_available():
        return f"torch sees no {device.type} device"
    if device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"Triton needs compute capability 8.0, {torch.cuda.get_device_name(device)} is older"
    if spec.scales_dtype not in _DTYPES:
        return f"{spec.scales_dtype} scales"
    return None


# -- layout ------------------------------------------------------------------------------------------------------------


def planes(bits: int) -> int:
    """Planes of 16 slots in a slab: as many as a word has codes (3 bits: 2 bits in a word, 1 in half a word)."""
    return 16 if bits == 3 else 32 // bits


def _interleave(codes: Tensor, bits: int) -> Tensor:
    """uint8 [slabs, planes, n] -> int32 [slabs, n]; plane i in field i of the words."""
    words = codes[:, 0].int()
    for i in range(1, codes.shape[1]):
        words |= codes[:, i].int() << (bits * i)
    return words


def _separate(words: Tensor, bits: int) -> Tensor:
    """Undo :func:`_interleave`. words: of any integer dtype."""
    shifts = range(0, words.itemsize * 8, bits)
    return torch.stack([((words >> shift) & ((1 << bits) - 1)).to(torch.uint8) for shift in shifts], 1)


def _pack(codes: Tensor, bits: int) -> Tensor:
    """uint8 [slots, W] -> int32 [slabs, rows of words, W]."""
    width, count = codes.shape[1], planes(bits)
    by_plane = codes.view(-1, count, PLANE * width)
    if bits != 3:
        return _interleave(by_plane, bits).view(-1, PLANE, width)
    high = _interleave(by_plane >> 2, 1).to(torch.int16).view(torch.int32)
    return torch.cat([_interleave(by_plane & 3, 2), high], 1).view(-1, PLANE * 3 // 2, width)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """Undo :func:`_pack`."""
    slabs, _, width = words.shape
    flat = words.reshape(slabs, -1)
    if bits != 3:
        return _separate(flat, bits).view(-1, width)
    low, high = flat.split([PLANE * width, PLANE * width // 2], 1)
    return (_separate(low, 2) | (_separate(high.contiguous().view(torch.int16), 1) << 2)).view(-1, width)


def _pad_columns(rows: Tensor) -> Tensor:
    return torch.nn.functional.pad(rows, (0, -rows.shape[1] % PLANE)).contiguous()


def prepare(spec: LinearSpec, tensors: Tensors) -> Tensors:
    """Checkpoint tensors -> the tensors above, on the same device."""
    device = tensors["qweight"].device
    g_idx = tensors["g_idx"].cpu() if spec.act_order else None
    perm, sizes, slots = group_slots(spec, g_idx, PLANE, planes(spec.bits) * PLANE)
    words = packing.to_int32_words(tensors["qweight"], 0)
    codes = _pad_columns(packing.unpack(words, spec.bits, source_channels(spec), spec.planar))
    if perm is None:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, slots - codes.shape[0]))
    else:
        perm = perm.to(device)
        codes = codes[perm.long()] * (perm >= 0).unsqueeze(1)
    prepared = {"qweight": _pack(codes, spec.bits), "scales": _pad_columns(tensors["scales"])}
    if not spec.sym:
        prepared["zeros"] = _pad_columns(unpack_zeros(spec, tensors["qzeros"]))
    if perm is not None:
        prepared["perm"] = perm
    if not bool((sizes[:-1] == math.ceil(spec.group_size / PLANE) * PLANE).all()):
        groups = torch.repeat_interleave(torch.arange(spec.groups), sizes // PLANE)
        prepared["groups"] = torch.nn.functional.pad(groups, (0, slots // PLANE - len(groups))).int().to(device)
    return prepared | {name: tensors[name] for name in ("qzeros", "g_idx") if name in tensors}


def unprepare(spec: LinearSpec, prepared: Tensors) -> Tensors:
    """The checkpoint tensors again, bit for bit."""
    channels, perm = source_channels(spec), prepared.get("perm")
    codes = _unpack(prepared["qweight"], spec.bits)[:, : spec.out_features]
    if perm is not None:
        real = perm >= 0
        codes = torch.empty_like(codes[:channels]).index_copy_(0, perm[real].long(), codes[real])
    codes = codes[:channels]
    if spec.planar and spec.bits == 3:
        codes = torch.nn.functional.pad(codes, (0, 0, 0, -channels % 32))
    words = packing.pack(codes, spec.bits, spec.planar)
    tensors = {
        "qweight": packing.from_int32_words(words, spec.word_dtype, 0, spec.shapes["qweight"][0]),
        "qzeros": prepared["qzeros"],
        "scales": prepared["scales"][:, : spec.out_features].contiguous(),
    }
    return tensors | ({"g_idx": prepared["g_idx"]} if "g_idx" in prepared else {})


# -- launching ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tile:
    """How a product is cut: rows and columns of y of one program, its warps, and loads in flight.

    A tile of one row is multiplied without matrix units; others have 16 rows or more.
    """

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Heuristics:
    """What suits an architecture. Estimates, not measured: see docs/kernels.md.

    Args:
        tiles: by rows, ascending; the first with enough rows is taken, else the last.
        programs: wanted per multiprocessor; K is split to reach it.
        dense_rows: from so many rows on, the weight is dequantized for the vendor's matrix product.
    """

    tiles: tuple[Tile, ...]
    programs: int = 4
    dense_rows: int = 512


_AMPERE = (Tile(1, 128, 4, 3), Tile(16, 128, 4, 4), Tile(32, 128, 8, 4), Tile(64, 128, 8, 3))
HEURISTICS = {
    "sm_80": Heuristics(_AMPERE),
    "sm_90": Heuristics((*_AMPERE, Tile(128, 128, 8, 3))),
    "gfx942": Heuristics((Tile(1, 128, 4, 2), Tile(16, 64, 4, 2), Tile(32, 128, 4, 2), Tile(64, 128, 4, 2))),
    "xpu": Heuristics((Tile(1, 64, 4, 2), Tile(16, 64, 4, 2), Tile(32, 64, 8, 2), Tile(64, 128, 16, 2))),
}
AUTOTUNE = os.environ.get("GPTQ_BACKEND_TRITON_AUTOTUNE", "0") not in ("", "0")


@dataclass(frozen=True)
class Machine:
    """A device: what suits it, its multiprocessors, and bytes of shared memory that a program can have."""

    heuristics: Heuristics
    processors: int
    shared: int


@functools.cache
def _machine(device: torch.device) -> Machine:
    if device.type == "cpu":  # Triton's interpreter
        return Machine(HEURISTICS["sm_80"], 2, 160 << 10)
    if device.type == "xpu":
        xpu = torch.xpu.get_device_properties(device)
        return Machine(HEURISTICS["xpu"], xpu.max_compute_units, xpu.local_mem_size)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return Machine(HEURISTICS["gfx942"], properties.multi_processor_count, 64 << 10)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    heuristics = HEURISTICS["sm_90" if properties.major in (9, 10) else "sm_80"]
    return Machine(heuristics, properties.multi_processor_count, shared)


@functools.cache
def _kernels() -> Any:
    return importlib.import_module(".triton_kernels", __package__)


def _on(device: torch.device) -> Any:
    """Triton launches on the current device."""
    return contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device)


@functools.cache
def fitting_tiles(bits: int, itemsize: int, device: torch.device) -> tuple[Tile, ...]:
    """The heuristics' tiles, with as many stages as fit into shared memory. itemsize: bytes of an element of x."""
    machine, slots = _machine(device), planes(bits) * PLANE
    tiles = []
    for tile in machine.heuristics.tiles:
        stage = slots * (tile.columns * bits // 8 + tile.rows * itemsize)
        if stages := min(tile.stages, machine.shared // stage):
            tiles.append(dataclasses.replace(tile, stages=stages))
    return tuple(tiles)


@functools.cache
def plan(rows: int, columns: int, slabs: int, bits: int, itemsize: int, device: torch.device) -> tuple[Tile, int]:
    """Tile for y [rows, columns], and how many programs share each sum over K."""
    tiles = fitting_tiles(bits, itemsize, device)
    tile = next((tile for tile in tiles if tile.rows >= rows), tiles[-1])
    return tile, _splits(_cdiv(rows, tile.rows) * _cdiv(columns, tile.columns), slabs, device)


def _splits(programs: int, slabs: int, device: torch.device) -> int:
    """programs: as many as there would be without splitting."""
    machine = _machine(device)
    wanted = machine.heuristics.programs * machine.processors // programs
    return _cdiv(slabs, _cdiv(slabs, min(max(wanted, 1), slabs)))  # none without a slab


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class _Layout:
    """The arguments that all operators share; with experts the tensors have a leading dimension E."""

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
        return self.slots // PLANE if self.scales.shape[-2] == 1 else _cdiv(self.group_size, PLANE)

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
    w: _Layout,
    bias: Tensor | None,
    tile: Tile,
    splits: int,
    order: Tensor | None = None,
    experts: Tensor | None = None,
    top_k: int = 1,
) -> Tensor:
    """x [rows / top_k, K] -> y [rows, N]; order and experts as in triton_kernels.gemm."""
    kernels, rows = _kernels(), x.shape[0] * top_k
    y = x.new_empty((rows, w.out_features))
    # The splits of a sum are added in a fixed order, never by atomics: results repeat bit for bit.
    parts = y if splits == 1 else x.new_empty((splits, rows, w.out_features), dtype=torch.float32)
    columns, slabs = _cdiv(w.out_features, tile.columns), (w.slabs, _cdiv(w.slabs, splits))
    tensors = (w.qweight, w.scales, w.zeros)
    options = {
        "BITS": w.bits,
        "SHARE": w.share,
        "BLOCK_N": tile.columns,
        "STAGES": tile.stages,
        "num_warps": tile.warps,
        "num_stages": tile.stages,
    }
    with _on(x.device):
        if tile.rows == 1:
            numbers = (w.in_features, w.out_features, *slabs, *w.sizes)
            kernels.gemv[columns, splits](x, *tensors, w.perm, w.groups, bias, parts, *numbers, **options)
        else:
            options["BLOCK_M"] = tile.rows
            routing, features = (order, experts, rows, top_k), w.in_features
            if w.perm is not None:
                gathered = x.new_empty((rows if order is None else order.numel(), w.slots))
                kernels.gather[len(gathered), _cdiv(w.slots, 1024)](
                    x, w.perm, gathered, *routing, features, w.slots, BLOCK_M=tile.rows, BLOCK=1024
                )
                x, features = gathered, w.slots
            tiles = _cdiv(rows, tile.rows) if experts is None else experts.numel()
            shape = (features, w.out_features, *slabs, *w.sizes)
            kernels.gemm[tiles, columns, splits](
                x, *tensors, w.groups, bias, parts, *routing, *shape, SORTED=w.perm is not None, **options
            )
        if splits > 1:
            kernels.add_splits[_cdiv(y.numel(), 1024),](parts, y, y.numel(), splits, BLOCK=1024)
    return y


def _dense(w: _Layout, dtype: torch.dtype, start: int, stop: int) -> Tensor:
    """[K, stop - start]: output channels of the dense weight."""
    y = torch.empty((w.in_features, stop - start), dtype=dtype, device=w.qweight.device)
    with _on(y.device):
        _kernels().dequantize[w.slabs, _cdiv(stop - start, 128)](
            *(w.qweight, w.scales, w.zeros, w.perm, w.groups, y, w.in_features, stop - start, start, *w.sizes),
            BITS=w.bits,
            BLOCK_N=128,
        )
    return y


_tuned: dict[tuple[Any, ...], tuple[Tile, int]] = {}


def _plan(x: Tensor, w: _Layout) -> tuple[Tile, int]:
    """The heuristics' choice, or with GPTQ_BACKEND_TRITON_AUTOTUNE=1 the fastest of its neighbours."""
    first = plan(x.shape[0], w.out_features, w.slabs, w.bits, x.itemsize, x.device)
    if not AUTOTUNE or (x.is_cuda and torch.cuda.is_current_stream_capturing()):
        return first
    key = (x.device, x.dtype, w.bits, w.share, w.slabs, w.out_features, first[0].rows, x.shape[0].bit_length())
    if key not in _tuned:
        time = importlib.import_module("triton.testing").do_bench
        choices = {
            (dataclasses.replace(first[0], columns=columns, warps=warps), _cdiv(w.slabs, _cdiv(w.slabs, splits)))
            for columns in (64, 128, 256)
            for warps in (4, 8)
            for splits in {max(1, first[1] // 2), first[1], min(w.slabs, first[1] * 2)}
        }
        _tuned[key] = min(choices, key=lambda choice: time(lambda: _multiply(x, w, None, *choice)))
    return _tuned[key]


# -- operators ---------------------------------------------------------------------------------------------------------


def _check(x: Tensor, w: _Layout) -> None:
    if x.device != w.qweight.device or not x.is_floating_point() or x.shape[-1:] != (w.in_features,):
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} on {x.device}, expected floating point with a last dimension of "
            f"{w.in_features} on {w.qweight.device}"
        )


def gemm(x: Tensor, *layout_and_bias: Any) -> Tensor:
    """``x @ W.T + bias``. x: float [..., K] -> [..., N] in the dtype of x. Other arguments: see the module.

    16-bit and float32 inputs meet exact codes, with sums and scales in float32; from ``Heuristics.dense_rows`` rows on,
    a weight rounded to the dtype of x. float64 goes through the dense weight too.

    Raises:
        ValueError: x is not a floating-point tensor with K columns on the device of the weight.
    """
    *layout, bias = layout_and_bias
    w = _Layout(*layout)
    _check(x, w)
    rows = x.reshape(-1, w.in_features).contiguous()
    if not len(rows):
        return x.new_empty((*x.shape[:-1], w.out_features))
    if x.dtype in _DTYPES and len(rows) < _machine(x.device).heuristics.dense_rows:
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
    *layout, dtype = layout_and_dtype
    w = _Layout(*layout)
    return _dense(w, dtype, 0, w.out_features)


def moe_rows(rows: int, experts: int, device: torch.device) -> int:
    """Rows of a block for :func:`moe_gemm`. rows: of y, in all."""
    tiles = [tile for tile in fitting_tiles(3, 4, device) if tile.rows > 1]  # those that fit for all bits and dtypes
    return next((tile.rows for tile in tiles if tile.rows >= rows / experts), tiles[-1].rows)


def moe_gemm(x: Tensor, *layout_and_more: Any) -> Tensor:
    """Each row of x times the weight of its expert; see moe.py. The layout's tensors have a leading dimension E."""
    *layout, order, experts, top_k, bias = layout_and_more
    w = _Layout(*layout)
    _check(x, w)
    if not len(x):
        return x.new_empty((0, w.out_features))
    if x.dtype not in _DTYPES:
        raise ValueError(f"x is {x.dtype}, expected one of {', '.join(map(str, _DTYPES))}; cast it")
    rows = order.numel() // experts.numel()
    tile = next(tile for tile in fitting_tiles(w.bits, x.itemsize, x.device) if tile.rows == rows)
    splits = _splits(experts.numel() * _cdiv(w.out_features, tile.columns), w.slabs, x.device)
    return _multiply(x.contiguous(), w, bias, tile, splits, order, experts, top_k)


def _gemm_fake(x, qweight, scales, zeros, perm, groups, in_features, out_features, bits, group_size, bias):  # type: ignore[no-untyped-def]
    return x.new_empty((*x.shape[:-1], out_features))


def _dequantize_fake(qweight, scales, zeros, perm, groups, in_features, out_features, bits, group_size, dtype):  # type: ignore[no-untyped-def]
    return scales.new_empty((in_features, out_features), dtype=dtype)


def _moe_gemm_fake(x: Tensor, *arguments: Any) -> Tensor:
    out_features, top_k = arguments[6], arguments[11]
    return x.new_empty((x.shape[0] * top_k, out_features))


_library.impl("triton_gemm", gemm, "CompositeExplicitAutograd")
_library.impl("triton_dequantize", dequantize, "CompositeExplicitAutograd")
_library.impl("triton_moe_gemm", moe_gemm, "CompositeExplicitAutograd")
torch.library.register_fake("gptq_backend::triton_moe_gemm", _moe_gemm_fake, lib=_library)
torch.library.register_fake("gptq_backend::triton_gemm", _gemm_fake, lib=_library)
torch.library.register_fake("gptq_backend::triton_dequantize", _dequantize_fake, lib=_library)
register_gradients(
    _library, "gptq_backend::triton_gemm", lambda *layout: torch.ops.gptq_backend.triton_dequantize(*layout).t()
)


def _arguments(spec: LinearSpec, prepared: Tensors) -> tuple[Any, ...]:
    tensors = (prepared["qweight"], prepared["scales"], *map(prepared.get, ("zeros", "perm", "groups")))
    return (*tensors, spec.in_features, spec.out_features, spec.bits, spec.group_size)


def apply(spec: LinearSpec, prepared: Tensors, x: Tensor, bias: Tensor | None) -> Tensor:
    """See ``Kernel``."""
    return gemm(x, *_arguments(spec, prepared), bias)


def op(spec: LinearSpec, prepared: Tensors, x: Tensor, bias: Tensor | None) -> Tensor:
    """See ``Kernel``."""
    return torch.ops.gptq_backend.triton_gemm(x, *_arguments(spec, prepared), bias)


def moe_op(
    spec: LinearSpec, stacked: Tensors, x: Tensor, order: Tensor, experts: Tensor, top_k: int, bias: Tensor | None
) -> Tensor:
    """See ``moe.MoeKernel``."""
    return torch.ops.gptq_backend.triton_moe_gemm(x, *_arguments(spec, stacked), order, experts, top_k, bias)
