"""A sum of numbered parts whose order of additions is fixed by their numbers alone, whoever holds which of them."""

from __future__ import annotations

from torch import Tensor

Node = tuple[int, int]  # (level, index): the parts number index * 2^level to (index + 1) * 2^level - 1
_LEVELS = 62
_ALL = 1 << _LEVELS  # more parts than there can be


class TreeSum:
    """Parts 2i and 2i + 1 are added, then the results of 4i and 4i + 2, and so on; a part that is missing is skipped.

    So it makes no difference whether one process adds all parts or several add theirs and then join their ``nodes``,
    and a process holds no more tensors at once than there are levels.

    Args:
        first: number of the first part that may be added.

    Attributes:
        nodes: the sums that are not yet joined.
    """

    def __init__(self, first: int = 0) -> None:
        self._first = self._next = first
        self.nodes: dict[Node, Tensor] = {}

    def add(self, number: int, part: Tensor) -> None:
        """Take a part, which is changed later; ``number`` is greater than those before."""
        assert number >= self._next, "parts are added once, in ascending order"
        self._next = number + 1
        self.nodes[0, number] = part
        _join(self.nodes, self._first, number + 1)

    def settle(self, total: Tensor) -> None:
        """Take what others know to be the sum."""
        self.nodes = {(_LEVELS, 0): total}

    def total(self) -> Tensor | None:
        """The sum, if the parts that were not added do not exist; None of no part."""
        return total(self.nodes)


def total(nodes: dict[Node, Tensor]) -> Tensor | None:
    """The sum of the nodes of all processes; they are used up."""
    _join(nodes, 0, _ALL)
    return next(iter(nodes.values()), None)


def _join(nodes: dict[Node, Tensor], first: int, stop: int) -> None:
    """Join what belongs together, given that of the parts number first to stop - 1 none is still to come."""
    level = 0
    while len(nodes) > 1 and level <= max(each for each, _ in nodes):
        for index in sorted(index for each, index in nodes if each == level):
            if (level, index) not in nodes:  # joined with the one before it
                continue
            other = index ^ 1
            if (right := nodes.pop((level, other), None)) is not None:
                nodes[level + 1, index // 2] = nodes.pop((level, index)).add_(right)
            elif first <= other << level and (other + 1) << level <= stop:
                nodes[level + 1, index // 2] = nodes.pop((level, index))
        level += 1
