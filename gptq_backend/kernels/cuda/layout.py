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

from ...format.weight import PackedWeight, WeightSpec
from ..interface import Tensors
from ..slots import by_channel, codes_by_slot, group_sizes, group_slots, rows_of, strips, words_by_channel

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
    # Lane 4g + t of a warp multiplies the channels g and g + 8 of a strip by the slots of which t has 8 in each of the
    # two units of a tile (the operand layout of mma.m16n8k16). So, splitting both indices,
    #     slot = (tile, unit 2, t 4, c 8), channel = (strip, half 2, g 8) -> strip, tile, lane (g, t), (half, unit, c)
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
    return strips(rows, STRIP).unflatten(2, (2, 8)).transpose(2, 3).flatten(2)


def _rows(tensor: Tensor, columns: int) -> Tensor:
    """Undo :func:`_strips`."""
    return rows_of(tensor.unflatten(2, (8, 2)).transpose(2, 3).flatten(2), columns)


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


def _slots(weight: PackedWeight) -> _Slots:
    """Slots of ``weight``, in the chunks that take the fewest bytes."""
    spec = weight.spec
    if weight.g_idx is None:
        largest, choices = min(spec.group_size, spec.in_features), set()
    else:  # groups may differ in size: then smaller chunks, with repeated scales, waste fewer slots
        largest, choices = int(torch.bincount(weight.g_idx.long()).max()), {32, 64, 128}
    choices |= {math.ceil(largest / multiple) * multiple for multiple in (_UNIT, TILE)}

    def slots(chunk: int) -> _Slots:
        perm, sizes, count = group_slots(weight, chunk, math.lcm(chunk, TILE))
        if perm is None and spec.in_features % 8:  # rows of x would not be aligned
            channel = torch.arange(count, dtype=torch.int32)
            perm = torch.where(channel < weight.channels, channel, -1)
        return _Slots(perm, sizes, count, chunk)

    def size(layout: _Slots) -> float:
        return layout.count * spec.bits / 8 + layout.count / layout.chunk * (
            spec.scales_dtype.itemsize + (not spec.sym)
        )

    return min((slots(chunk) for chunk in sorted(choices, reverse=True)), key=size)


def prepare(weight: PackedWeight) -> Tensors:
    """The tensors above; see ``Kernel``."""
    spec, device, layout = weight.spec, weight.qweight.device, _slots(weight)
    groups, perm = layout.groups.to(device), None if layout.perm is None else layout.perm.to(device)

    def by_chunk(rows: Tensor) -> Tensor:
        return _strips(torch.where(groups.unsqueeze(1) >= 0, rows[groups.clamp(min=0)], rows.new_zeros(())))

    parts = []
    for columns in _slices(spec, layout.count):
        codes = codes_by_slot(weight, columns, perm, layout.count)
        parts.append(_pack(torch.nn.functional.pad(codes, (0, -codes.shape[1] % STRIP)), spec.bits))
    prepared = {"qweight": torch.cat(parts), "scales": by_chunk(weight.scales)}
    if not spec.sym:
        prepared["zeros"] = by_chunk(weight.zeros)
    if perm is not None:
        prepared["perm"] = perm
    if not bool(layout.sizes.all()):
        prepared["stored_scales"] = weight.scales
    return prepared


def unprepare(spec: WeightSpec, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor | None]:
    """See ``Kernel``."""
    words, perm = tensors["qweight"], tensors.get("perm")
    slots, chunks = words.shape[1] * TILE, tensors["scales"].shape[1]
    parts = []
    for columns in _slices(spec, slots):
        part = slice(columns.start // STRIP, math.ceil(columns.stop / STRIP))
        codes = _unpack(words[part], spec.bits)[:, : columns.stop - columns.start]
        parts.append(words_by_channel(codes, spec.bits, perm))
    g_idx = tensors["g_idx"].cpu() if spec.act_order else None
    groups = _Slots(perm, group_sizes(spec, g_idx, slots // chunks)[1], slots, slots // chunks).groups
    # The first chunk of each group that has channels tells its scales; a group without has nothing to tell.
    first = (groups >= 0) & (groups != torch.nn.functional.pad(groups, (1, 0), value=-1)[:-1])

    def by_group(tensor: Tensor) -> Tensor:
        by_chunk = _rows(tensor, spec.out_features)
        rows = by_chunk.new_zeros((spec.groups, spec.out_features))
        rows[groups[first].to(rows.device)] = by_chunk[first.to(rows.device)]
        return rows

    scales = tensors["stored_scales"] if "stored_scales" in tensors else by_group(tensors["scales"])
    return torch.cat(parts, 1), scales, by_group(tensors["zeros"]) if "zeros" in tensors else None


def rows_at(
    ids: Tensor, qweight: Tensor, scales: Tensor, zeros: Tensor | None, perm: Tensor | None, bits: int, in_features: int
) -> Tensor:
    """Rows of ``nn.Linear.weight``: float32 [n, K].

    Args:
        ids: int64 [n], output channels.
        qweight, scales, zeros, perm: as above.
    """
    slots = qweight.shape[1] * TILE
    # Whole strips are unpacked, of which a row is one of 16; so few at a time that this takes little memory.
    parts = []
    for few in ids.split(max(1, (1 << 24) // (slots * STRIP))):
        strip, column = few // STRIP, few % STRIP

        def of_row(by_strip: Tensor, column: Tensor = column) -> Tensor:
            by_strip = by_strip.view(len(by_strip), -1, STRIP)
            return by_strip[:, torch.arange(len(column), device=column.device), column].t().float()

        def of_slot(tensor: Tensor, strip: Tensor = strip) -> Tensor:
            by_chunk = of_row(_rows(tensor.index_select(0, strip), len(strip) * STRIP))
            return by_chunk.repeat_interleave(slots // tensor.shape[1], 1)

        codes = of_row(_unpack(qweight.index_select(0, strip), bits))
        offset = 1 << (bits - 1) if zeros is None else of_slot(zeros)
        parts.append(by_channel((codes - offset) * of_slot(scales), perm, in_features))
    return torch.cat(parts) if parts else scales.new_empty((0, in_features), dtype=torch.float32)


def _slices(spec: WeightSpec, slots: int) -> list[slice]:
    """Output channels in whole strips, few enough that repacking them takes little memory."""
    step = max(1, (1 << 24) // (slots * STRIP)) * STRIP
    return [slice(n, min(n + step, spec.out_features)) for n in range(0, spec.out_features, step)]
