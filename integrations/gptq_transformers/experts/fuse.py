"""Undo :mod:`unfuse` where all experts are dense again, so that the model has transformers' own modules and names."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend.model import replace_module

from .expert_list import ExpertList
from .fused_layout import FusedLayout, fused_layout
from .parallel import ParallelLinears

logger = logging.getLogger(__name__)


def fuse_experts(model: nn.Module, new: Mapping[str, nn.Module]) -> None:
    """Put the modules of ``new``, by name, back in the place of lists of experts, with the weights of those.

    One list at a time, so that beside the model only one layer's experts need memory. Those of which a layer is
    offloaded, or was replaced by another one (an adapter's, say), stay, and that is said.
    """
    for name, module in [*model.named_modules()]:
        if not isinstance(module, ExpertList | ParallelLinears):
            continue
        fused, layers = new[name], _layers(module)
        if any(type(layer) is not nn.Linear or layer.weight.is_meta for layer in layers):
            logger.warning(
                "%s: its experts stay apart, because some are offloaded or were replaced; saved like this, plain "
                "transformers may not find them",
                name,
            )
            continue
        if isinstance(module, ParallelLinears):
            weights = {"weight": torch.stack([layer.weight.detach() for layer in layers])}
        else:
            layout = fused_layout(fused)
            assert layout is not None  # else there would be no list
            weights = _fused(module, layout)
        trainable = next(module.parameters()).requires_grad
        for key, weight in weights.items():
            setattr(fused, key, nn.Parameter(weight, trainable))
        for key, child in module.named_children():
            if key in fused._modules:  # the activation, a norm
                setattr(fused, key, child)
        replace_module(model, name, fused.train(module.training))


def _layers(module: ExpertList | ParallelLinears) -> list[Any]:
    if isinstance(module, ParallelLinears):
        return [*module.children()]
    return [layer for index in range(module.num_experts) for layer in module.projections(index)]


def _fused(experts: ExpertList, layout: FusedLayout) -> dict[str, Tensor]:
    """The parameters of the fused module: weights [E, N, K], or [E, K, N] where it is transposed, and biases [E, N]."""
    found: dict[str, list[Tensor]] = {name: [] for name in layout.parameters}
    for index in range(experts.num_experts):
        layers: list[Any] = experts.projections(index)
        for name, parts in ((layout.first, layers[:-1]), ("down_proj", layers[-1:])):
            weight = _rows([layer.weight.detach() for layer in parts], experts.concatenated)
            found[name].append(weight.t() if layout.transposed else weight)
            if layout.biased:
                biases = [layer.bias.detach() for layer in parts]
                found[f"{name}_bias"].append(_rows(biases, experts.concatenated))
    return {name: torch.stack(matrices) for name, matrices in found.items()}


def _rows(parts: list[Tensor], concatenated: bool) -> Tensor:
    """Weights or biases of gate and up, if they are two, as the rows of the one matrix of the model."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat(parts) if concatenated else torch.stack(parts, 1).flatten(0, 1)
