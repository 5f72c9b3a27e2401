"""Experts of mixtures on several ranks: each expert's tokens go to one rank, which quantizes it, and tells the others.

Gathering the inputs of an expert moves its tokens once, each of the K channels wide; adding up Hessians would move K
rows of them from every rank. With 8 of 128 experts chosen and 32768 tokens to calibrate on, an expert has about as many
tokens as channels, so the tokens are as many bytes as a single Hessian. And all that follows, the factor too, is then
done by one rank while the others do other experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from torch import Tensor, nn

from ..distributed.team import Team, as_tensor, from_tensor
from ..model.mixtures import Mixture, find_mixture
from ..model.structure import Block, Target

_PER_RANK = 4  # experts of a round: their inputs are in memory at once, and ranks wait for the slowest


@dataclass(frozen=True, eq=False)
class Round:
    """Some experts of a mixture that are quantized at the same time, by their numbers."""

    mixture: Mixture
    targets: dict[int, tuple[Target, ...]]

    def owners(self, team: Team) -> dict[int, int]:
        """The rank of each expert."""
        return {expert: team.worker(position) for position, expert in enumerate(self.targets)}


@dataclass(frozen=True, eq=False)
class ExpertInput:
    """What one calibration batch feeds an expert."""

    number: int  # of the batch
    expert: int
    x: Tensor  # [n, H]
    mask: Tensor | None  # of padding, if its shape tells
    weights: dict[nn.Module, Tensor]  # of tokens, by layer


@dataclass(eq=False)
class Recording:
    """What a forward pass would feed experts, of which it calls none; others than the ``wanted`` are left out."""

    wanted: set[int]
    inputs: list[ExpertInput] = field(default_factory=list)


class Ownership:
    """Which experts of a model's blocks each rank of a team quantizes; without rounds, all of them together do.

    Args:
        blocks: those whose experts are shared out.
        divides: whether only its owner needs an expert's weight; else every rank runs the blocks as they were.
    """

    def __init__(self, blocks: Iterable[Block], divides: bool, team: Team) -> None:
        self._divides, self._team = divides, team
        # None in a team of one, whose passes come by each expert anyway.
        shared = blocks if team.size > 1 else ()
        self._rounds = {block: [e for m in _mixtures(block) for e in _rounds(m, block, team)] for block in shared}

    def rounds(self, block: Block) -> list[Round]:
        """Of the experts of a block, in their order."""
        return self._rounds.get(block, [])

    def elsewhere(self, block: Block) -> frozenset[nn.Module] | None:
        """Layers of experts whose weights only other ranks need; None where every rank needs all."""
        rounds = self.rounds(block)
        if not rounds or not self._divides:
            return None
        ranks = [(each.targets[expert], rank) for each in rounds for expert, rank in each.owners(self._team).items()]
        return frozenset(target.module for targets, rank in ranks if rank != self._team.rank for target in targets)

    def is_divided(self, target: Target, block: Block) -> bool:
        """Whether only one rank may have the layer's weight."""
        owned = {own for each in self.rounds(block) for targets in each.targets.values() for own in targets}
        return self._divides and target in owned


def _mixtures(block: Block) -> Iterator[Mixture]:
    yield from (mixture for module in block.module.modules() if (mixture := find_mixture(module)) is not None)


def _rounds(mixture: Mixture, block: Block, team: Team) -> Iterator[Round]:
    own = {
        i: tuple(each for each in block.targets if each.module in inside) for i, inside in enumerate(mixture.experts)
    }
    numbers = [i for i, targets in own.items() if targets]
    together = _PER_RANK * team.size
    for first in range(0, len(numbers), together):
        yield Round(mixture, {i: own[i] for i in numbers[first : first + together]})


def send_to_owners(team: Team, each: Round, inputs: list[ExpertInput]) -> dict[int, list[ExpertInput]]:
    """Exchange what the ranks' batches feed the experts of a round -> the inputs of this rank's experts, by batch."""
    owner = each.owners(team)
    pieces: list[list[Tensor]] = []
    for rank in range(team.size):
        sent = [entry for entry in inputs if owner[entry.expert] == rank]
        facts = []
        tensors: list[Tensor] = []
        for entry in sent:
            layers = [i for i, target in enumerate(each.targets[entry.expert]) if target.module in entry.weights]
            facts.append([entry.number, entry.expert, entry.mask is not None, layers])
            tensors += [entry.x, *([] if entry.mask is None else [entry.mask])]
            tensors += [entry.weights[each.targets[entry.expert][i].module] for i in layers]
        pieces.append([as_tensor(facts), *tensors])
    found: dict[int, list[ExpertInput]] = {expert: [] for expert, rank in owner.items() if rank == team.rank}
    for told, *rest in team.exchange(pieces):
        tensors = list(rest)
        for number, expert, masked, layers in from_tensor(told):
            x, mask = tensors.pop(0), tensors.pop(0) if masked else None
            weights = {each.targets[expert][i].module: tensors.pop(0) for i in layers}
            found[expert].append(ExpertInput(number, expert, x, mask, weights))
    return {expert: sorted(entries, key=lambda entry: entry.number) for expert, entries in found.items()}


def gather_names(team: Team, targets: list[Target]) -> set[str]:
    """The names of the layers that the ranks pass."""
    told = team.all_gather([as_tensor([target.name for target in targets])])
    return {name for (each,) in told for name in from_tensor(each)}
