"""What processes that work together (ranks) ask of each other, and the answers of a process that works alone."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class Team:
    """A team of one: it has all of the work, and what it hears is what it said.

    Every rank calls the same methods in the same order. Tensors that it gets are on the device that the sender's were
    on, or on this rank's own one in place of the sender's.
    """

    rank, size = 0, 1

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes, shows and reports."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """The batches of so many that are this rank's: consecutive ones."""
        return range(count * self.rank // self.size, count * (self.rank + 1) // self.size)

    def holder(self, index: int, count: int) -> int:
        """The rank in whose :meth:`share` a batch is."""
        return (self.size * (index + 1) - 1) // count

    def worker(self, index: int) -> int:
        """The rank that does a part of some work: dealt there and back, so that each gets small and large ones."""
        there = index % (2 * self.size)
        return min(there, 2 * self.size - 1 - there)

    def all_gather(self, tensors: Sequence[Tensor]) -> list[list[Tensor]]:
        """What every rank passed, by rank."""
        return [list(tensors)]

    def exchange(self, pieces: Sequence[Sequence[Tensor]]) -> list[list[Tensor]]:
        """Pass ``pieces[r]`` to rank r -> what every rank had for this one, by rank."""
        return [list(each) for each in pieces]

    def broadcast(self, source: int, tensors: Callable[[], Sequence[Tensor]]) -> list[Tensor]:
        """What rank ``source`` makes; no other one calls ``tensors``."""
        return list(tensors())

    def told(self, source: int, value: Callable[[], Any]) -> Any:
        """The JSON value that rank ``source`` makes; no other one calls ``value``."""
        return from_tensor(self.broadcast(source, lambda: [as_tensor(value())])[0])

    def least(self, value: int) -> int:
        """The least of the ranks' values."""
        return value

    def work(self, count: int, part: Callable[[int], list[Tensor]]) -> list[list[Tensor]]:
        """The tensors of so many independent parts, each made by one rank: a :data:`Sharing`."""
        mine = [i for i in range(count) if self.worker(i) == self.rank]
        made = [part(i) for i in mine]
        sizes = torch.tensor([len(each) for each in made], dtype=torch.int64)
        found = self.all_gather([sizes, *(tensor for each in made for tensor in each)])
        results: list[list[Tensor]] = [[] for _ in range(count)]
        for rank, (lengths, *tensors) in enumerate(found):
            for i, length in zip((i for i in range(count) if self.worker(i) == rank), lengths.tolist()):
                results[i], tensors = tensors[:length], tensors[length:]
        return results


def as_tensor(value: Any) -> Tensor:
    """A JSON value as bytes, to be passed on."""
    return torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)


def from_tensor(tensor: Tensor) -> Any:
    """Undo :func:`as_tensor`."""
    return json.loads(bytes(tensor.cpu().tolist()))
