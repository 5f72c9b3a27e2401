"""How what follows depends on a layer's outputs: their derivatives' second moments, for row_feedback.

The derivatives are those of token_weights.py, which every layer before attention gets anyway.
"""

from __future__ import annotations

from torch import Tensor, nn

from ..algorithm.hessian import Hessian
from ..algorithm.row_feedback import RowFactor, factor_rows
from ..distributed.team import Team
from .hessian_sums import add_up

_WIDEST = 8192  # output channels; all layers before attention have two moments [N, N] at the same time


class RowMoments:
    """Those of the layers of one block, by halves of the batches of all ranks of a team."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._halves: dict[nn.Module, tuple[Hessian, Hessian]] = {}

    def clear(self) -> None:
        """Before another block."""
        self._halves.clear()

    def add(self, number: int, layer: nn.Module, derivatives: Tensor) -> None:
        """Those of a batch, [..., N], 0 at padding; numbers ascend."""
        rows = derivatives.shape[-1]
        if rows > _WIDEST:
            return
        if layer not in self._halves:
            self._halves[layer] = _empty(rows, derivatives, number)
        found = derivatives.reshape(-1, rows)
        # Padding would count as tokens, on whose number the damping depends.
        self._halves[layer][number % 2].add(found[found.any(1)], number=number // 2)

    def factor(self, layer: nn.Module, like: Tensor) -> RowFactor | None:
        """For a layer with the weight ``like`` [N, K], if feedback helps; all ranks ask for it."""
        known = self._halves.pop(layer, None)
        if not self._team.least(-int(known is not None)):
            return None
        halves = known or _empty(len(like), like, 0)
        for half in halves:
            add_up(half, self._team)
        if not all(half.tokens for half in halves):
            return None
        first, second = (half.matrix("") for half in halves)
        return factor_rows((first, second), (halves[0].tokens, halves[1].tokens), self._team.work)


def _empty(rows: int, like: Tensor, first: int) -> tuple[Hessian, Hessian]:
    """Even and odd batches; ``first`` is the first number."""
    even, odd = (Hessian(rows, device=like.device, first=(first + 1 - odd) // 2) for odd in range(2))
    return even, odd
