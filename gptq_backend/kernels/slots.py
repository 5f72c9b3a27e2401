"""Input channels sorted by group and padded: the order of K in the layouts of all kernels, and the way there and back.

Every group is padded to whole runs of slots, so that act-order, ragged groups and slices of either are one case: a run
of slots lies in one group. Prepared layers keep ``qzeros`` and ``g_idx`` as they were: they are small, and the way back
is exact.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..format import packing
from ..format.weight import LinearSpec

Tensors = dict[str, Tensor]


def source_channels(spec: LinearSpec) -> int:
    """Input channels that the words of the checkpoint have room for, tail included."""
    return spec.shapes["qweight"][0] * spec.word_dtype.itemsize * 8 // spec.bits


def group_slots(spec: LinearSpec, g_idx: Tensor | None, run: int, multiple: int) -> tuple[Tensor | None, Tensor, int]:
    """Where each input channel goes.

    Args:
        g_idx: int [K] on the CPU, or None without act-order.
        run: slots that a group is padded to a multiple of.
        multiple: what the number of slots is padded to a multiple of; it is a multiple of run.

    Returns:
        perm: int32 [slots], the channel of each slot, in ascending order within a group: K or more for the bits that
            only fill the checkpoint's last words, -1 for padding. None where slot = channel.
        sizes: int64 [G], slots of each group; the slots after their sum belong to no group.
        slots: how many there are.
    """
    size, channels = spec.group_size, source_channels(spec)
    if g_idx is None:
        counts = (spec.in_features - torch.arange(spec.groups) * size).clamp(0, size)
    else:
        counts = torch.bincount(g_idx.long(), minlength=spec.groups)
    sizes = (counts + run - 1) // run * run
    used = int(sizes.sum())
    if g_idx is None and (size % run == 0 or spec.groups == 1):
        return None, sizes, math.ceil(max(used, channels) / multiple) * multiple
    slots = math.ceil((used + channels - spec.in_features) / multiple) * multiple
    perm = torch.full((slots,), -1, dtype=torch.int32)
    index = spec.trivial_g_idx.long() if g_idx is None else g_idx.long()
    order = torch.sort(index, stable=True).indices
    rank = torch.arange(spec.in_features) - (counts.cumsum(0) - counts)[index[order]]
    perm[(sizes.cumsum(0) - sizes)[index[order]] + rank] = order.int()
    perm[used : used + channels - spec.in_features] = torch.arange(spec.in_features, channels, dtype=torch.int32)
    return perm, sizes, slots


def codes_by_slot(spec: LinearSpec, words: Tensor, perm: Tensor | None, slots: int) -> Tensor:
    """uint8 [slots, N], padding 0. words: int32 [rows, N], of ``qweight``; perm and slots: of :func:`group_slots`."""
    codes = packing.unpack(words, spec.bits, source_channels(spec), spec.planar)
    if perm is None:
        return torch.nn.functional.pad(codes, (0, 0, 0, slots - len(codes)))
    return codes[perm.clamp(min=0).long()] * (perm >= 0).unsqueeze(1)


def codes_by_channel(spec: LinearSpec, codes: Tensor, perm: Tensor | None) -> Tensor:
    """Undo :func:`codes_by_slot`, up to the words -> uint8 [source channels, N]."""
    channels = source_channels(spec)
    if perm is None:
        return codes[:channels]
    real = perm >= 0
    return torch.empty_like(codes[:channels]).index_copy_(0, perm[real].long(), codes[real])


def pack_channels(spec: LinearSpec, codes: Tensor) -> Tensor:
    """uint8 [source channels, N] -> int32 words [rows, N]."""
    if spec.planar and spec.bits == 3:  # the file may end within the last run of 32
        codes = torch.nn.functional.pad(codes, (0, 0, 0, -len(codes) % 32))
    return packing.pack(codes, spec.bits, spec.planar)


def kept(tensors: Tensors) -> Tensors:
    """What a prepared layer holds as it was in the checkpoint."""
    return {name: tensors[name] for name in ("qzeros", "g_idx") if name in tensors}


def stored(spec: LinearSpec, words: Tensor, scales: Tensor, prepared: Tensors) -> Tensors:
    """The checkpoint's tensors. words: int32 [>= rows, N]; scales: [G, N]; prepared: with what :func:`kept` gave."""
    qweight = packing.from_int32_words(words, spec.word_dtype, 0, spec.shapes["qweight"][0])
    tensors = kept(prepared)
    return {"qweight": qweight, "qzeros": tensors.pop("qzeros"), "scales": scales} | tensors
