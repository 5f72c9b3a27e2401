"""Input channels sorted by group and padded: the order of K in the layouts of all kernels.

Every group is padded to whole runs of slots, so that act-order, ragged groups and slices of either are one case: a run
of slots lies in one group.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .weight import LinearSpec


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
