"""Input channels sorted by group and padded: the order of K in the layouts of all kernels, and the way there and back.

Every group is padded to whole runs of slots, so that act-order, ragged groups and slices of either are one case: a run
of slots lies in one group::

    g_idx       1 0 0 1 1 ...                    channel of each slot, run = 4
    slots       [ 1  2  7  -1 | 0  3  4  9 | ...         -1: padding
                  group 0       group 1
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ..format import packing
from ..format.weight import PackedWeight, WeightSpec


def group_sizes(spec: WeightSpec, g_idx: Tensor | None, run: int) -> tuple[Tensor, Tensor]:
    """int64 [G] each: input channels of each group, and slots, which are whole runs. g_idx: int [K] on the CPU."""
    if g_idx is None:
        counts = (spec.in_features - torch.arange(spec.groups) * spec.group_size).clamp(0, spec.group_size)
    else:
        counts = torch.bincount(g_idx.long(), minlength=spec.groups)
    return counts, (counts + run - 1) // run * run


def group_slots(weight: PackedWeight, run: int, multiple: int) -> tuple[Tensor | None, Tensor, int]:
    """Where each input channel goes; on the CPU.

    Args:
        weight: K channels, and room for more in its last words, which is kept.
        run: slots that a group is padded to a multiple of.
        multiple: what the number of slots is padded to a multiple of; it is a multiple of run.

    Returns:
        perm: int32 [slots], the channel of each slot, in ascending order within a group: K or more for the bits that
            only fill the last words, -1 for padding. None where slot = channel.
        sizes: int64 [G], slots of each group; the slots after their sum belong to no group.
        slots: how many there are.
    """
    spec, channels = weight.spec, weight.channels
    g_idx = None if weight.g_idx is None else weight.g_idx.cpu()
    counts, sizes = group_sizes(spec, g_idx, run)
    used = int(sizes.sum())
    if g_idx is None and (spec.group_size % run == 0 or spec.groups == 1):
        return None, sizes, math.ceil(max(used, channels) / multiple) * multiple
    slots = math.ceil((used + channels - spec.in_features) / multiple) * multiple
    perm = torch.full((slots,), -1, dtype=torch.int32)
    index = spec.trivial_g_idx.long() if g_idx is None else g_idx.long()
    # A channel's slot: where its group begins, and how many of the group's channels come before it.
    order = torch.sort(index, stable=True).indices
    rank = torch.arange(spec.in_features) - (counts.cumsum(0) - counts)[index[order]]
    perm[(sizes.cumsum(0) - sizes)[index[order]] + rank] = order.int()
    perm[used : used + channels - spec.in_features] = torch.arange(spec.in_features, channels, dtype=torch.int32)
    return perm, sizes, slots


def codes_by_slot(weight: PackedWeight, columns: slice, perm: Tensor | None, slots: int) -> Tensor:
    """uint8 [slots, n], padding 0, of the output channels ``columns``; perm and slots: of :func:`group_slots`."""
    codes = packing.unpack(weight.qweight[:, columns], weight.spec.bits, weight.channels)
    if perm is None:
        return torch.nn.functional.pad(codes, (0, 0, 0, slots - len(codes)))
    return codes[perm.clamp(min=0).long()] * (perm >= 0).unsqueeze(1)


def words_by_channel(codes: Tensor, bits: int, perm: Tensor | None) -> Tensor:
    """Undo :func:`codes_by_slot`: uint8 [slots, n] -> int32 words [>= ceil(K*bits/32), n]."""
    if perm is not None:
        real = perm >= 0
        by_channel = torch.empty((int(real.sum()), codes.shape[1]), dtype=torch.uint8, device=codes.device)
        codes = by_channel.index_copy_(0, perm[real].long(), codes[real])
    return packing.pack(codes, bits)


def strips(rows: Tensor, width: int) -> Tensor:
    """[G, N] -> [ceil(N/width), G, width]: output channels in strips, padded with zeros."""
    padded = torch.nn.functional.pad(rows, (0, -rows.shape[1] % width))
    return padded.view(len(rows), -1, width).transpose(0, 1).contiguous()


def rows_of(strips: Tensor, columns: int) -> Tensor:
    """Undo :func:`strips`; columns: N."""
    return strips.transpose(0, 1).reshape(strips.shape[1], -1)[:, :columns].contiguous()


def by_channel(by_slot: Tensor, perm: Tensor | None, channels: int) -> Tensor:
    """[n, slots] -> [n, channels]."""
    if perm is None:
        return by_slot[:, :channels]
    # Padding lands in one more column, so that nothing has to be counted on the host.
    place = torch.where((perm >= 0) & (perm < channels), perm, channels).long()
    return by_slot.new_empty((len(by_slot), channels + 1)).index_copy_(1, place, by_slot)[:, :channels]
