"""Which output channels of the layers that an expert is stored in a rank needs, and in which order they come out."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gptq_backend.format import ExpertLayout


def shards(layout: ExpertLayout) -> dict[str, str]:
    """Paths of ``layout`` by what vLLM calls them: w1 is the gate (or up, where there is no gate), w3 is up, w13 is
    both in one, and w2 is down.
    """
    apart = ("w1", "w2") if len(layout.paths) == 2 else ("w1", "w3", "w2")
    return dict(zip(("w13", "w2") if layout.joined else apart, layout.paths, strict=True))


@dataclass(frozen=True)
class FirstProduct:
    """Gate and up as the one matrix that vLLM's activation expects the product of.

    Args:
        gated: there is a gate.
        alternating: the activation takes gate and up from channels that alternate, else from the two halves.
        total: output channels of the gate, all ranks together.
        first, count: those of them that this rank has.
    """

    gated: bool
    alternating: bool
    total: int
    first: int
    count: int

    def rows(self, shard: str, halves: bool) -> Tensor:
        """int64 [n]: the output channels of a stored layer that this rank needs, which may be none.

        Args:
            halves: see :class:`ExpertLayout`.
        """
        return torch.isin(self._places(shard, halves), self._own()).nonzero()[:, 0]

    def order(self, stored: list[str], halves: bool) -> Tensor | None:
        """Where in the product of the stored layers side by side each channel is that the activation takes: int64 [N];
        None if it is where it should be.
        """
        places = torch.cat([self._places(shard, halves)[self.rows(shard, halves)] for shard in stored])
        order = places.argsort()
        return None if torch.equal(order, torch.arange(len(order))) else order

    def _places(self, shard: str, halves: bool) -> Tensor:
        """Where in the whole matrix the output channels of a stored layer are."""
        if shard == "w13":
            return torch.arange(2 * self.total)
        channels, second = torch.arange(self.total), int(shard == "w3")
        return 2 * channels + second if self.alternating and not halves else channels + second * self.total

    def _own(self) -> Tensor:
        """Where in the whole matrix this rank's channels are, in ascending order."""
        if self.alternating:
            return torch.arange(2 * self.first, 2 * (self.first + self.count))
        own = torch.arange(self.first, self.first + self.count)
        return torch.cat([own, self.total + own]) if self.gated else own
