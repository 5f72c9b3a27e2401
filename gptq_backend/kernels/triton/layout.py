"""The layout of the ``triton`` row of the kernel table, drawn in docs/kernels.md.

Prepared tensors, with K, N, G as in docs/format.md, "slots" as in slots.py and W = N padded to a multiple of 16:

    qweight int32 [slabs, rows of words, W]; scales [G, W] in the checkpoint's dtype; zeros uint8 [G, W] unless all are
    2**(bits-1); perm int32 [slots], the channel of each slot (>= K for padding or negative), unless slot = channel;
    groups int32 [slots/16], the group of every 16 slots, unless all groups but the last are of ``group_size`` channels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...format.weight import PackedWeight, WeightSpec
from ..interface import Tensors
from ..slots import by_channel, codes_by_slot, group_slots, words_by_channel

PLANE = 16


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


def prepare(weight: PackedWeight) -> Tensors:
    """The tensors above; see ``Kernel``."""
    spec, device = weight.spec, weight.qweight.device
    perm, sizes, slots = group_slots(weight, PLANE, planes(spec.bits) * PLANE)
    perm = None if perm is None else perm.to(device)
    codes = _pad_columns(codes_by_slot(weight, slice(None), perm, slots))
    prepared = {"qweight": _pack(codes, spec.bits), "scales": _pad_columns(weight.scales)}
    if not spec.sym:
        prepared["zeros"] = _pad_columns(weight.zeros)
    if perm is not None:
        prepared["perm"] = perm
    if not bool((sizes[:-1] == math.ceil(spec.group_size / PLANE) * PLANE).all()):
        groups = torch.repeat_interleave(torch.arange(spec.groups), sizes // PLANE)
        prepared["groups"] = torch.nn.functional.pad(groups, (0, slots // PLANE - len(groups))).int().to(device)
    return prepared


def unprepare(spec: WeightSpec, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor | None]:
    """See ``Kernel``."""
    codes = _unpack(tensors["qweight"], spec.bits)[:, : spec.out_features]
    scales, zeros = tensors["scales"][:, : spec.out_features].contiguous(), tensors.get("zeros")
    qweight = words_by_channel(codes, spec.bits, tensors.get("perm"))
    return qweight, scales, None if zeros is None else zeros[:, : spec.out_features].contiguous()


def rows_at(
    ids: Tensor,
    qweight: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    groups: Tensor,
    perm: Tensor | None,
    bits: int,
    in_features: int,
) -> Tensor:
    """Rows of ``nn.Linear.weight``: float32 [n, K].

    Args:
        ids: int64 [n], output channels.
        groups: int [slots/16], the group of every 16 slots; where there are none, any.
        qweight, scales, zeros, perm: as above.
    """
    if bits == 3:  # the third bits of two channels share a word
        high = qweight[:, PLANE:].contiguous().view(torch.int16).view(len(qweight), PLANE, -1)
        low, high = qweight[:, :PLANE].index_select(2, ids), high.index_select(2, ids)
        codes = _separate(low.flatten(1), 2) | (_separate(high.flatten(1), 1) << 2)
        codes = codes.view(-1, len(ids))
    else:
        codes = _unpack(qweight.index_select(2, ids), bits)
    of_slot = groups.long().repeat_interleave(PLANE)
    offset = 1 << (bits - 1) if zeros is None else zeros.index_select(1, ids).float()[of_slot]
    dense = ((codes.float() - offset) * scales.index_select(1, ids).float()[of_slot]).t()
    return by_channel(dense, perm, in_features)
