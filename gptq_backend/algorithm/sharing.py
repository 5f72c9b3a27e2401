"""How work that falls into independent parts is done: by this process alone, unless a caller passes another way."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

# Given a number of parts and what makes the tensors of one, the tensors of all in their order.
Sharing = Callable[[int, Callable[[int], list[Tensor]]], list[list[Tensor]]]


def alone(count: int, part: Callable[[int], list[Tensor]]) -> list[list[Tensor]]:
    """Every part in this process."""
    return [part(i) for i in range(count)]
