"""The layout of the ``cuda`` row of the kernel table, drawn in docs/kernels.md.

Prepared tensors, with K, N, G as in docs/format.md and "slots" as in slots.py:

    qweight int32 [ceil(N/16), tiles, 32*bits]: a tile is 16 output channels by 64 slots; scales in the checkpoint's
    dtype [ceil(N/16), chunks, 16], and zeros uint8 alike unless all are 2**(bits-1): a chunk is the slots that share a
    scale, and all chunks have the same number of slots; perm int32 [slots], the channel of each slot (>= K for the bits
    that only fill the checkpoint's last words, negative for padding), unless slot = channel.

In the rare case of a group without channels, ``stored_scales`` are kept as well.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ...format import packing
from ...format.weight import LinearSpec, unpack_zeros
from ..slots import Tensors, codes_by_channel, codes_by_slot, group_slots, kept, pack_channels, source_channels, stored

STRIP, TILE = 16, 64
_UNIT = 32


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
    lanes = codes.view(slots // TILE, 2, 4, 8, channels // STRIP, 2, 8).permute(4, 0, 6, 2, 5, 1, 3)
    lanes = lanes.reshape(channels // STRIP, slots // TILE, 32, 32)
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
    return codes.reshape(tiles * TILE, strips * STRIP)


def _strips(rows: Tensor) -> Tensor:
    """[chunks, N] -> [ceil(N/16), chunks, 16], channels g and g + 8 adjacent, padded with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % STRIP))
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
    choices |= {math.ceil(largest / multiple) * multiple for multiple in (_UNIT, TILE)}

    def slots(chunk: int) -> _Slots:
        perm, sizes, count = group_slots(spec, g_idx, chunk, math.lcm(chunk, TILE))
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
        codes = codes_by_slot(spec, words[:, columns], perm, layout.count)
        parts.append(_pack(torch.nn.functional.pad(codes, (0, -codes.shape[1] % STRIP)), spec.bits))
    prepared = {"qweight": torch.cat(parts), "scales": by_chunk(tensors["scales"])}
    if not spec.sym:
        prepared["zeros"] = by_chunk(unpack_zeros(spec, tensors["qzeros"]))
    if perm is not None:
        prepared["perm"] = perm
    if not bool(layout.sizes.all()):
        prepared["stored_scales"] = tensors["scales"]
    return prepared | kept(tensors)


def unprepare(spec: LinearSpec, prepared: Tensors) -> Tensors:
    """The checkpoint tensors again, bit for bit."""
    words = prepared["qweight"]
    parts = []
    for columns in _slices(spec, words.shape[1] * TILE):
        strips = slice(columns.start // STRIP, math.ceil(columns.stop / STRIP))
        codes = _unpack(words[strips], spec.bits)[:, : columns.stop - columns.start]
        parts.append(pack_channels(spec, codes_by_channel(spec, codes, prepared.get("perm"))))
    scales = prepared.get("stored_scales")
    if scales is None:
        by_chunk = _rows(prepared["scales"], spec.out_features)
        g_idx = prepared["g_idx"].cpu() if spec.act_order else None
        groups = _layout(spec, g_idx).groups
        first = torch.cat([torch.ones(1, dtype=torch.bool), groups[1:] != groups[:-1]]) & (groups >= 0)
        scales = by_chunk[first.to(by_chunk.device)]
    return stored(spec, torch.cat(parts, 1), scales, prepared)


def _slices(spec: LinearSpec, slots: int) -> list[slice]:
    """Output channels in whole strips, few enough that repacking them takes little memory."""
    step = max(1, (1 << 24) // (slots * STRIP)) * STRIP
    return [slice(n, min(n + step, spec.out_features)) for n in range(0, spec.out_features, step)]
