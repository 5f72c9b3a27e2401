"""A budget for a model of transformers: the whole model in memory, measured, and the settings that spend the budget."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from gptq_backend import ConfigError, Events, QuantizeConfig, RunOptions
from gptq_backend.budget import Goal, plan_budget
from gptq_backend.model import Progress, find_blocks, find_structure

from .block_reader import Bring
from .dispatch import keeping_hooks
from .experts.conversions import are_only_renamed, keep_packed_names, stored_names
from .experts.unfuse import unfuse_experts
from .memory import bytes_of, free_bytes
from .streaming import load_whole


def spend_budget(
    model: PreTrainedModel,
    bring: Bring,
    source: str | Path | None,
    config: QuantizeConfig,
    goal: Goal,
    calibration: Any,
    options: RunOptions,
    events: Events,
    progress: Progress,
    trust_remote_code: bool,
) -> QuantizeConfig:
    """The settings that :func:`gptq_backend.budget.plan_budget` chooses; ``events`` is told the plan.

    Args:
        model: with a layer for each expert; only read.
        bring: brings the weights of a block of ``model``.
        source: the folder or name to load it from as a whole, if its blocks are to stay in the files.
        calibration: token id samples.

    Raises:
        ConfigError: memory does not hold the model as a whole, or as of ``plan_budget``.
    """
    _check_memory(model, source is None, options.device, goal)
    if source is None:
        for block in find_blocks(model, options.block_name).values():
            bring(block)
        whole = model
    else:
        whole = load_whole(source, trust_remote_code=trust_remote_code)
        with keeping_hooks(whole):
            unfuse_experts(whole)
        layers = find_structure(whole, config, options.block_name).targets
        keep_packed_names(whole, [f"{layer.name}.{key}" for layer in layers for key in ("weight", "bias")])
    plan = plan_budget(
        whole,
        config,
        calibration,
        goal,
        options=options,
        events=events,
        progress=progress,
        stored_names=partial(stored_names, whole) if are_only_renamed(whole) else None,
    )
    return plan.config


def _check_memory(model: PreTrainedModel, loaded: bool, device: torch.device | str | None, goal: Goal) -> None:
    """Raises ConfigError where the sensitivity pass would run out of memory: on a CPU it computes in float32.

    loaded: what the model takes as it is, it has already.
    """
    where = torch.device(device or "cpu")
    dtype = torch.float32 if where.type == "cpu" else model.dtype
    needed, free = bytes_of(model, dtype), free_bytes(where)
    if needed - (bytes_of(model, model.dtype) if loaded else 0) > free:
        raise ConfigError(
            f"a budget of {goal} is spent by measuring the whole model in {str(dtype).removeprefix('torch.')}, which "
            f"takes {needed / 1e9:.1f} GB of memory of {where}, and {free / 1e9:.1f} GB are free; run where there is "
            "more, or choose bits yourself (bits, group_size, dynamic)"
        )
