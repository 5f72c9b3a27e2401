"""Train the scales and norms of one quantized block towards what the original block passes on; codes stay as they are.

The first phase of EfficientQAT (arXiv 2407.11062) without its training of weights: Adam on the squared difference
between the quantized block's output, on what the quantized blocks before it pass on, and the original's, on what the
original blocks do. So a block also makes up for what those before it lost.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..distributed.team import Team
from ..format.weight import QuantizedWeight
from ..model.structure import Block
from ..timing import timed
from .scales import Training, schedule, trainable, validation_batches

_RATE = 2e-3  # largest relative change of a scale in one step
_FACTOR = 64  # of the loss, by channel: to Adam all are the same, but small gradients vanish in float16


@dataclass(frozen=True)
class BlockReport:
    """How the training of a block went."""

    name: str
    before: float  # squared error of its output on the batches that were held out, as a share of the output's energy
    after: float  # likewise
    kept: bool  # whether the result was taken: after < before


@dataclass(frozen=True)
class Example:
    """One calibration batch at one block."""

    run: Callable[[], Any]  # the block with what reaches it
    target: Tensor  # [B, T, K], what the original block returns
    mask: Tensor | None  # [B, T], 0 marks padding; None if nothing is padded

    def error(self) -> Tensor:
        """Squared difference of the block's output and the target, summed."""
        difference = output_tensor(self.run()).float() - self.target.float()
        return self._counted(difference).square().sum()

    def energy(self) -> float:
        """Squared target, summed."""
        return float(self._counted(self.target.float()).square().sum())

    def _counted(self, values: Tensor) -> Tensor:
        return values if self.mask is None or self.mask.shape != values.shape[:-1] else values[self.mask.bool()]


@timed("block training")
@torch.enable_grad()
def train_block(
    block: nn.Module,
    name: str,
    weights: Mapping[str, QuantizedWeight],
    vectors: Iterable[nn.Parameter],
    examples: Mapping[int, Example],
    epochs: int,
    stored: Callable[[Tensor], torch.dtype],
    team: Team,
) -> tuple[BlockReport, dict[str, QuantizedWeight]]:
    """Train a block's vectors, in place, and its quantized weights.

    Args:
        block: unchanged but for ``vectors``; they too if the result is no better.
        name: for the report.
        weights: of its linear layers, by their names in the block.
        vectors: parameters of the block to train beside them, like norm weights.
        examples: this rank's, by their numbers; of all there are at least two, and every eighth, or the last of fewer,
            is held out.
        epochs: passes over the rest.
        stored: the dtype that a parameter of the block will be stored in.
        team: whose ranks take the same steps, each after the gradient of the one that has the example.

    Returns:
        The report, and the trained weights; none if they are no better on the examples that were held out.

    Raises:
        CalibrationError: fewer than two examples.
    """
    holders = _holders(examples, team)
    numbers = sorted(holders)
    steps, held_out = schedule(len(numbers), epochs), validation_batches(len(numbers))

    def mean(of: Callable[[Example], float]) -> float:
        """Over the examples that are held out."""
        own = [of(examples[numbers[i]]) for i in held_out if numbers[i] in examples]
        found = team.all_gather([torch.tensor(own, dtype=torch.float64)])
        return math.fsum(value for (values,) in found for value in values.tolist()) / len(held_out)

    energy = max(mean(Example.energy), 1e-30)

    def mean_error() -> float:
        with torch.no_grad():
            return mean(lambda example: float(example.error())) / energy

    with trainable(block, weights, vectors, stored) as state:
        before = mean_error()
        state.run(
            [numbers[i] for i in steps],
            _RATE,
            lambda number: _step(state, examples.get(number), energy, holders[number], team),
        )
        state.round()
        after = mean_error()
        state.keep = after < before
        results = state.results() if state.keep else {}
    return BlockReport(name, before, after, state.keep), results


def _holders(examples: Mapping[int, Example], team: Team) -> dict[int, int]:
    """The rank that has each example, by its number."""
    found = team.all_gather([torch.tensor([*examples], dtype=torch.int64)])
    return {number: rank for rank, (numbers,) in enumerate(found) for number in numbers.tolist()}


def _step(state: Training, example: Example | None, energy: float, holder: int, team: Team) -> float:
    """Give all ranks the gradient of the example that ``holder`` has -> its loss."""
    trained = state.computing

    def gradients() -> list[Tensor]:
        assert example is not None
        loss = example.error() / energy
        if loss.requires_grad:  # else no token of the batch reaches what is trained
            (loss * (_FACTOR * example.target.shape[-1])).backward()
        has = torch.tensor([parameter.grad is not None for parameter in trained])
        return [loss.detach().double().cpu(), has, *(p.grad for p in trained if p.grad is not None)]

    loss, has, *found = team.broadcast(holder, gradients)
    for parameter, present in zip(trained, has.tolist()):
        parameter.grad = found.pop(0) if present else None
    return float(loss)


def trainable_vectors(model: nn.Module, block: Block) -> dict[str, nn.Parameter]:
    """What is trained beside a block's quantized layers, by full names: norm weights and the like, but no bias of a
    quantized layer, and nothing that blocks share.
    """
    uses = Counter(id(parameter) for _, parameter in model.named_parameters(remove_duplicate=False))
    linear = {id(parameter) for target in block.targets for parameter in target.module.parameters()}
    return {
        name: parameter
        for name, parameter in block.module.named_parameters(prefix=block.name)
        if parameter.dim() == 1
        and parameter.is_floating_point()
        and uses[id(parameter)] == 1
        and id(parameter) not in linear
    }


def output_tensor(output: Any) -> Tensor:
    """What a block passes on to the next, which some return with other things behind it."""
    return output[0] if isinstance(output, tuple) else output
