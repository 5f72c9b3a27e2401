"""What each way to store each layer costs: the table that a budget is spent by."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..config import QuantizeConfig
from ..errors import ConfigError
from ..model.calibration import make_batches
from ..model.placement import Placement, tensors_of
from ..model.progress import Progress
from ..model.structure import find_structure
from ..pipeline.options import Events, RunOptions
from .divergence import predict_divergences
from .embedding import embedding_targets, measure_embeddings
from .rounding import probe_rounding
from .storage import STORAGES, Storage

_WINDOWS = 16  # of calibration text, for everything here
_EMBEDDING_WINDOWS = 4
_NAME = "sensitivity"  # of the entry in the progress


@dataclass(frozen=True)
class GroupCosts:
    """KL divergence in nats per token that rounding alone these layers causes, by way to store all of them."""

    block: str  # full name
    layers: tuple[str, ...]  # full names
    costs: dict[Storage, float]


@dataclass(frozen=True)
class Sensitivity:
    """All of a model's groups of layers, and the embedding by its bits."""

    groups: tuple[GroupCosts, ...]
    embedding: dict[int, float]


def measure_sensitivity(
    model: nn.Module,
    config: QuantizeConfig,
    calibration: Sequence[Any] | Tensor,
    embedding: bool,
    options: RunOptions,
    events: Events,
    progress: Progress,
) -> Sensitivity:
    """Measure on the first windows of ``calibration``; the model is in memory as a whole, and as before afterwards.

    Args:
        embedding: whether to measure it, too.
        progress: where an interrupted run has left what it found.

    Raises:
        ConfigError, CalibrationError: the message says what to do.
    """
    samples = calibration[:_WINDOWS]
    windows = make_batches(samples, 1)
    tensors = [value for batch in windows for value in batch.values() if isinstance(value, Tensor)]
    names = [block.name for block in find_structure(model, config, options.block_name).blocks]
    facts = [_NAME, config.to_dict(), embedding, names, str(options.device), options.calibrate_all_experts]
    digest = progress.digest("", facts, [*tensors, *tensors_of(model)])
    if (entry := progress.load(_NAME, digest)) is not None:
        return _read(*entry)
    steps = itertools.count(1)

    def step() -> None:
        events.sensitivity_step(next(steps), len(names) + len(windows))

    groups = probe_rounding(model, config, make_batches(samples, options.batch_size), STORAGES, options, step)
    if not groups:
        raise ConfigError(
            "no layer is left to choose a width for: no calibration token reached one without a rule of its own; leave "
            "the budget out, or remove rules from dynamic"
        )
    placement = Placement(options.device)
    costs = predict_divergences(model, groups, windows, placement, step)
    targets = embedding_targets(model, config) if embedding else {}
    found = Sensitivity(
        tuple(GroupCosts(group.block, group.names, each) for group, each in zip(groups, costs, strict=True)),
        measure_embeddings(model, targets, windows[:_EMBEDDING_WINDOWS], placement),
    )
    progress.save(_NAME, digest, lambda: _entry(found))
    return found


def _entry(found: Sensitivity) -> tuple[dict[str, Tensor], Any]:
    """For :meth:`Progress.save`."""
    groups = [(each.block, each.layers, [[s.bits, s.group_size] for s in each.costs]) for each in found.groups]
    costs = torch.tensor([cost for each in found.groups for cost in each.costs.values()], dtype=torch.float64)
    return {"costs": costs}, {"groups": groups, "embedding": list(found.embedding.items())}


def _read(tensors: dict[str, Tensor], facts: Any) -> Sensitivity:
    """Undo :func:`_entry`."""
    costs = iter(tensors["costs"].tolist())
    groups = [
        GroupCosts(block, tuple(layers), {Storage(size, bits): next(costs) for bits, size in choices})
        for block, layers, choices in facts["groups"]
    ]
    return Sensitivity(tuple(groups), dict(facts["embedding"]))
