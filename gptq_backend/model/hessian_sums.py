"""The Hessian of all ranks' batches from those that each rank made of its own."""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from ..algorithm.drift import CrossMoment
from ..algorithm.hessian import Hessian
from ..algorithm.tree_sum import total
from ..distributed.team import Team


def add_up(hessian: Hessian | CrossMoment, team: Team) -> None:
    """Let ``hessian``, of this rank's batches, be that of the team's.

    Each rank adds up one slice of the entries, from the sums of all ranks that are not yet joined: with a power of two
    of both batches and ranks one for each rank, which makes this a reduce-scatter and a gather, as an all-reduce is.
    """
    nodes = hessian.sum.nodes
    keys = torch.tensor([*nodes], dtype=torch.int64).reshape(-1, 2)
    counts = torch.tensor([hessian.tokens, hessian.dropped])
    edges = [hessian.size * i // team.size for i in range(team.size + 1)]
    pieces = [
        [counts, keys, *(node[first:stop] for node in nodes.values())] for first, stop in itertools.pairwise(edges)
    ]
    received = team.exchange(pieces)
    del pieces
    nodes.clear()  # their memory
    mine: dict[tuple[int, int], Tensor] = {}
    hessian.tokens = hessian.dropped = 0
    for (tokens, dropped), levels, *slices in received:
        hessian.tokens += int(tokens)
        hessian.dropped += int(dropped)
        mine |= {(level, index): each for (level, index), each in zip(levels.tolist(), slices)}
    found = total(mine)
    if found is not None:
        parts = team.all_gather([found.to(hessian.device)])
        hessian.sum.settle(torch.cat([part for (part,) in parts]))
