"""Which expert each row belongs to, in the orders that kernels want."""

from __future__ import annotations

import torch
from torch import Tensor


class Routing:
    """Which expert each row of y belongs to; the projections of a layer share it.

    Args:
        ids: int [...], one per row; outside of 0..experts-1 for none: such rows come out as zeros.
        experts: E.
    """

    def __init__(self, ids: Tensor, experts: int) -> None:
        ids = ids.flatten()
        self.ids, self.experts = ids if ids.dtype in (torch.int32, torch.int64) else ids.long(), experts
        self._blocks: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self._runs: list[tuple[int, Tensor]] | None = None

    def blocks(self, block: int, parts: int = 1) -> tuple[Tensor, Tensor]:
        """:func:`sort_by_expert`, with ``parts`` rows in the place of each, of the experts e, E + e, and so on."""
        if (block, parts) not in self._blocks:
            if parts == 1:
                self._blocks[block, 1] = sort_by_expert(self.ids, self.experts, block)
            else:
                order, experts = self.blocks(block)
                of_part = [torch.where(experts < 0, -1, experts + part * self.experts) for part in range(parts)]
                orders = [order * parts + part for part in range(parts)]
                self._blocks[block, parts] = torch.cat(orders), torch.cat(of_part)
        return self._blocks[block, parts]

    def runs(self) -> list[tuple[int, Tensor]]:
        """(expert, int64 row numbers in ascending order) of every expert that has rows. Waits for the device."""
        if self._runs is None:
            known = torch.where((self.ids < 0) | (self.ids >= self.experts), self.experts, self.ids)
            counts = torch.bincount(known, minlength=self.experts + 1).tolist()
            rows = known.argsort(stable=True).split(counts)
            self._runs = [(expert, rows[expert]) for expert in range(self.experts) if counts[expert]]
        return self._runs


def sort_by_expert(ids: Tensor, experts: int, block: int) -> tuple[Tensor, Tensor]:
    """Rows sorted by expert, each expert's in whole blocks.

    Args:
        ids: int [...], the expert of each row; outside of 0..experts-1 for none.
        experts: E.
        block: rows of a block.

    Returns:
        order: int32 [blocks * block], row numbers; ``ids.numel()`` for padding.
        experts: int32 [blocks], the expert of each block, -1 for none. Their number depends on shapes only.
    """
    rows = ids.numel()
    # Each expert, and "none", leaves at most one block incomplete; no block but those after the last is empty.
    blocks = min(rows, rows // block + experts + 1)
    flat = ids.flatten().long()
    flat = torch.where((flat < 0) | (flat >= experts), experts, flat)
    by_expert, order = flat.sort(stable=True)  # "none" sorts last, as expert E
    counts = torch.zeros(experts + 1, dtype=torch.long, device=ids.device).scatter_add_(0, flat, torch.ones_like(flat))
    padded = (counts + block - 1) // block * block
    ends = padded.cumsum(0)  # where the blocks of each expert end, in rows
    # A row's place: where its expert's blocks begin, and how many of the expert's rows come before it.
    rank = torch.arange(rows, device=ids.device) - (counts.cumsum(0) - counts)[by_expert]
    padded_order = torch.full((blocks * block,), rows, dtype=torch.int32, device=ids.device)
    padded_order[(ends - padded)[by_expert] + rank] = order.int()
    # The expert of a block is the first whose rows end behind the block's first row.
    first = torch.arange(0, blocks * block, block, device=ids.device)
    expert = torch.searchsorted(ends, first, right=True)
    return padded_order, torch.where(expert >= experts, -1, expert).int()
