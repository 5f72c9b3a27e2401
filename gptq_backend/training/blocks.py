"""Train the scales and norms of one quantized block towards what the original block passes on; codes stay as they are.

The first phase of EfficientQAT (arXiv 2407.11062) without its training of weights: Adam on the squared difference
between the quantized block's output, on what the quantized blocks before it pass on, and the original's, on what the
original blocks do. So a block also makes up for what those before it lost.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..format.weight import QuantizedWeight
from ..model.structure import Block
from ..timing import timed
from .scales import schedule, trainable, validation_batches

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
    examples: Sequence[Example],
    epochs: int,
    stored: Callable[[Tensor], torch.dtype],
) -> tuple[BlockReport, dict[str, QuantizedWeight]]:
    """Train a block's vectors, in place, and its quantized weights.

    Args:
        block: unchanged but for ``vectors``; they too if the result is no better.
        name: for the report.
        weights: of its linear layers, by their names in the block.
        vectors: parameters of the block to train beside them, like norm weights.
        examples: at least two; every eighth, or the last of fewer, is held out.
        epochs: passes over the rest.
        stored: the dtype that a parameter of the block will be stored in.

    Returns:
        The report, and the trained weights; none if they are no better on the examples that were held out.

    Raises:
        CalibrationError: fewer than two examples.
    """
    steps = schedule(len(examples), epochs)
    held_out = [examples[i] for i in validation_batches(len(examples))]
    energy = max(sum(example.energy() for example in held_out) / len(held_out), 1e-30)

    factor = _FACTOR * examples[0].target.shape[-1]

    def mean_error() -> float:
        with torch.no_grad():
            return sum(float(example.error()) for example in held_out) / (len(held_out) * energy)

    def backward(index: int) -> float:
        loss = examples[index].error() / energy
        if loss.requires_grad:  # else no token of the batch reaches what is trained
            (loss * factor).backward()
        return loss.item()

    with trainable(block, weights, vectors, stored) as state:
        before = mean_error()
        state.run(steps, _RATE, backward)
        state.round()
        after = mean_error()
        state.keep = after < before
        results = state.results() if state.keep else {}
    return BlockReport(name, before, after, state.keep), results


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
