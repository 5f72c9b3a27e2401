"""In which order the column loop visits input channels, and which group each belongs to."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import QuantizeConfig


@dataclass(frozen=True)
class ColumnOrder:
    """Which channel when, and in which group."""

    perm: Tensor  # int64 [K], the i-th channel to quantize
    g_idx: Tensor  # int32 [K], the group of each channel (by channel, not by position)
    # Fit all grids before the loop; otherwise each when the loop reaches its group, whose channels are then consecutive
    # in perm.
    static: bool


def column_order(diagonal: Tensor, config: QuantizeConfig) -> ColumnOrder:
    """Order for a layer whose Hessian diagonal is ``diagonal`` (float [K]). Ties keep the channel order."""
    channels = diagonal.numel()
    size = channels if config.group_size == -1 else config.group_size
    position = torch.arange(channels, device=diagonal.device)
    trivial = (position // size).int()
    by_importance = torch.sort(diagonal, descending=True, stable=True).indices
    if config.desc_act and not config.static_groups:
        g_idx = torch.empty_like(trivial)
        g_idx[by_importance] = trivial
        return ColumnOrder(by_importance, g_idx, static=False)
    if config.desc_act:
        return ColumnOrder(by_importance, trivial, static=True)
    if config.group_aware:
        groups = int(trivial[-1]) + 1
        peak = torch.full((groups,), -torch.inf, dtype=diagonal.dtype, device=diagonal.device)
        peak = peak.scatter_reduce(0, trivial.long(), diagonal, "amax")
        # The inverse of a permutation: rank[g] is the place of group g when groups are sorted by their peak.
        rank = torch.empty(groups, dtype=torch.long, device=diagonal.device)
        rank[torch.sort(peak, descending=True, stable=True).indices] = position[:groups]
        # Stable sort by group rank on top of the sort by importance: groups in order, and so are columns inside each.
        perm = by_importance[torch.sort(rank[trivial[by_importance].long()], stable=True).indices]
        return ColumnOrder(perm, trivial, config.static_groups)
    return ColumnOrder(position, trivial, config.static_groups)
