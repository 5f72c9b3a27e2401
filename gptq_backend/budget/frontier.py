"""Which sizes can be had at which divergence: one choice for each of several groups of layers (a multiple-choice
knapsack), for all budgets at once.

Groups are merged one after another. Of the sums so far, only those stay that no other one beats in both bytes and
divergence. That is exact until more than ``_POINTS`` stay; then the best of each of so many ranges of bytes stays.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

_POINTS = 20_000


@dataclass(frozen=True, eq=False)
class Frontier:
    """Sums that are worth having, by rising bytes and falling divergence.

    Args:
        nbytes: int64 [P].
        divergence: float64 [P].
        picks: of each group, in the order of merging: which sum before it and which of its choices made a sum [P'].
    """

    nbytes: Tensor
    divergence: Tensor
    picks: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def within(self, budget: float) -> int | None:
        """The point of least divergence in at most ``budget`` bytes; None if even the smallest takes more."""
        below = int((self.nbytes <= budget).sum())
        return below - 1 if below else None

    def choices(self, point: int) -> list[int]:
        """Of each group, which of its choices makes ``point``."""
        found = []
        for before, choice in reversed(self.picks):
            found.append(int(choice[point]))
            point = int(before[point])
        return found[::-1]


def find_frontier(groups: Sequence[Sequence[tuple[int, float]]], points: int = _POINTS) -> Frontier:
    """groups: bytes and divergence of each choice of each group; every group has at least one."""
    nbytes, divergence = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    picks = []
    for group in groups:
        more_bytes = torch.tensor([size for size, _ in group])
        more_divergence = torch.tensor([found for _, found in group], dtype=torch.float64)
        sums = (nbytes[:, None] + more_bytes).flatten()
        costs = (divergence[:, None] + more_divergence).flatten()
        order = _undominated(sums, costs)
        if len(order) > points:
            order = _thinned(order, sums, points)
        nbytes, divergence = sums[order], costs[order]
        picks.append((order // len(group), order % len(group)))
    return Frontier(nbytes, divergence, picks)


def _undominated(sums: Tensor, costs: Tensor) -> Tensor:
    """Indices of those that cost less than all that take no more bytes, by rising bytes."""
    order = costs.argsort(stable=True)
    order = order[sums[order].argsort(stable=True)]
    least = costs[order].cummin(0).values
    better = torch.ones(len(order), dtype=torch.bool)
    better[1:] = least[1:] < least[:-1]
    return order[better]


def _thinned(order: Tensor, sums: Tensor, points: int) -> Tensor:
    """The first of ``order``, and the last (best) one in each of ``points`` - 1 equal ranges of bytes."""
    low, high = int(sums[order[0]]), int(sums[order[-1]])
    ranges = (sums[order] - low) * (points - 1) // (high - low + 1)
    last = torch.ones(len(order), dtype=torch.bool)
    last[:-1] = ranges[1:] != ranges[:-1]
    last[0] = True
    return order[last]
