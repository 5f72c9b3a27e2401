"""Mixture-of-experts models: one linear layer per expert and projection, where transformers 5 has one 3-D parameter.

GPTQ quantizes each expert's matrices for themselves, and checkpoints hold ``experts.{i}.gate_proj.qweight``. So the
fused module is replaced by an :class:`ExpertList` with the checkpoint's names inside. transformers 4 has such modules
by itself: nothing here finds anything to do there. How names survive loading and saving: see :mod:`conversions`.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend import CheckpointError, ConfigError
from gptq_backend.format import ExpertLayout, default_layout, expert_layout
from gptq_backend.model import replace_module
from gptq_backend.module_moves import offloading_hook

from .conversions import model_conversions, produces
from .expert_list import ExpertList, SortedExpertList, halves
from .fused_layout import FusedLayout, fused_layout
from .parallel import ParallelLinears, is_parallel

logger = logging.getLogger(__name__)


def unfuse_experts(model: nn.Module) -> list[str]:
    """Replace every fused experts module of ``model`` by an :class:`ExpertList` with the same weights, in place.

    One module is split at a time and its fused parameters are dropped, so that beside the model only one layer's
    experts need memory. Weights may be on meta. Modules that keep 3-D expert weights in a way that is not understood
    are left alone, with a warning.

    Returns:
        Names of the replaced modules.

    Raises:
        ConfigError: the weights are offloaded by accelerate.
    """
    found: dict[str, FusedLayout] = {}
    parallel = []
    for name, module in model.named_modules():
        layout = fused_layout(module)
        if layout is not None:
            found[name] = layout
        elif is_parallel(module):
            parallel.append(name)
        elif any(parameter.dim() == 3 for key, parameter in module.named_parameters(recurse=False) if "proj" in key):
            logger.warning("%s (%s): its 3-D expert weights stay in 16 bits", name, type(module).__name__)
    conversions = model_conversions(model) if found else []
    for name, layout in found.items():
        names = _projection_names(name, layout, conversions)
        _replace(model, name, _unfused(model.get_submodule(name), layout, name, names))
    for name in parallel:
        _replace(model, name, _separated(model.get_submodule(name), name))
    return [*found, *parallel]


def _replace(model: nn.Module, name: str, experts: nn.Module) -> None:
    """Put experts in their place; what initializes weights that a checkpoint lacks may reach into them from outside."""
    replace_module(model, name, experts)
    model.get_submodule(name.rpartition(".")[0])._is_hf_initialized = True  # type: ignore[assignment]


def group_experts(model: nn.Module) -> None:
    """Multiply the quantized experts of ``model`` by grouped products where possible, and log where it is not."""
    obstacles = {name: module.group() for name, module in model.named_modules() if isinstance(module, ExpertList)}
    apart = {name: why for name, why in obstacles.items() if why}
    if apart:
        name, why = next(iter(apart.items()))
        logger.warning(
            "the experts of %d of %d layers are multiplied one by one, which is slower; %s: %s",
            *(len(apart), len(obstacles), name, "; ".join(why)),
        )
    elif obstacles:
        logger.info("the experts of %d layers are multiplied by grouped products", len(obstacles))


def replace_fused_experts(
    model: nn.Module, layers: Collection[str], quantized: Iterable[str], halves: bool = False
) -> list[str]:
    """Prepare ``model``, still without weights, for a checkpoint with one tensor per expert.

    When any quantized layer is an expert's, all experts modules are replaced, also where a layer's experts are dense
    or mixed: such a checkpoint names them alike everywhere. Dense experts are plain ``nn.Linear``. The same where all
    are dense, but have names that transformers does not fuse.

    Args:
        layers: full names of all the checkpoint's layers, as the model has them.
        halves: see :class:`ExpertLayout`; counts where gate and up are apart.

    Returns:
        Names of the replaced modules.

    Raises:
        CheckpointError: the experts' layers have names that are not known.
    """
    holders = {layer.rpartition(".")[0] for layer in layers}
    parallel = [name for name, module in model.named_modules() if name in holders and is_parallel(module)]
    for name in parallel:
        _replace(model, name, _separated(model.get_submodule(name), name))
    return parallel + _replace_routed_experts(model, layers, quantized, halves)


def _replace_routed_experts(
    model: nn.Module, layers: Iterable[str], quantized: Iterable[str], halves: bool
) -> list[str]:
    found = {name: layout for name, module in model.named_modules() if (layout := fused_layout(module)) is not None}
    inside = tuple(f"{name}." for name in found)
    by_module: dict[str, list[str]] = {name: [] for name in found}
    for layer in layers if found else ():
        if layer.startswith(inside):
            by_module[next(name for name in _parents(layer) if name in found)].append(layer)
    if not any(by_module.values()):
        return []
    for name, inner in by_module.items():
        _check_complete(name, inner, model.get_parameter(f"{name}.down_proj").shape[0])
    conversions = model_conversions(model)
    usual = {name: _projection_names(name, layout, conversions) for name, layout in found.items()}
    names = {name: expert_layout(name, by_module[name], layout.gated) or usual[name] for name, layout in found.items()}
    fuses = all(any(produces(each, f"{name}.down_proj") for each in conversions) for name in found)
    if fuses and names == usual and not any(name.startswith(inside) for name in quantized):
        return []  # dense, and transformers fuses them
    for name, layout in found.items():
        called = dataclasses.replace(names[name], halves=halves and not names[name].joined)
        _replace(model, name, _unfused(model.get_submodule(name), layout, name, called))
    return list(found)


def _check_complete(module: str, layers: Iterable[str], count: int) -> None:
    """Raise if the ``layers`` inside ``module`` are of some of its ``count`` experts only."""
    numbers = {int(p) for layer in layers for p in layer.removeprefix(f"{module}.").split(".") if p.isdecimal()}
    if numbers and (absent := set(range(count)) - numbers):
        raise CheckpointError(
            f"{module}: the checkpoint has {len(numbers)} of the model's {count} experts (expert {min(absent)} is "
            "missing); fetch all of its files, or export it again: some tools write only the first expert"
        )


def _parents(name: str) -> Iterable[str]:
    while name := name.rpartition(".")[0]:
        yield name


def _separated(fused: nn.Module, name: str) -> ParallelLinears:
    _check_not_offloaded(fused, name)
    return ParallelLinears(_linear(weight, None) for weight in fused.get_parameter("weight"))


def _check_not_offloaded(fused: nn.Module, name: str) -> None:
    if offloading_hook(fused) is not None:
        raise ConfigError(
            f"{name}: its weights are offloaded to CPU or disk; load the model without offloading to split its experts"
        )


def _unfused(fused: nn.Module, layout: FusedLayout, name: str, names: ExpertLayout) -> ExpertList:
    _check_not_offloaded(fused, name)
    experts = []
    for index in range(fused.get_parameter("down_proj").shape[0]):
        first = _matrices(fused, layout.first, index, layout, split=layout.gated and not names.joined)
        experts.append([_linear(*pair) for pair in (*first, *_matrices(fused, "down_proj", index, layout))])
    kind = SortedExpertList if layout.sorted_rows else ExpertList
    return kind(fused, experts, names, layout.parameters, layout.passing)


def _matrices(
    fused: nn.Module, parameter: str, index: int, layout: FusedLayout, split: bool = False
) -> list[tuple[Tensor, Tensor | None]]:
    """Weight [N, K] and bias [N] of each projection that lies in ``parameter`` of expert ``index``."""
    weight = getattr(fused, parameter)[index]
    weight = weight.t() if layout.transposed else weight
    bias = getattr(fused, f"{parameter}_bias")[index] if layout.biased else None
    if not split:
        return [(weight, bias)]
    biases = (None, None) if bias is None else halves(bias, 0, layout.concatenated)
    return list(zip(halves(weight, 0, layout.concatenated), biases, strict=True))


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Copies, not views: each is freed by itself once quantized, and safetensors refuses shared storage."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    trainable = weight.requires_grad
    linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), trainable)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(memory_format=torch.contiguous_format), trainable)
    return linear


def _projection_names(module: str, layout: FusedLayout, conversions: Sequence[Any]) -> ExpertLayout:
    """As published checkpoints call them: ``*.w1.weight``, ``*.w3.weight`` become ``gate_up_proj``."""
    names: list[str] = []
    for parameter in (layout.first, "down_proj"):
        for conversion in conversions:
            sources = [re.search(r"\*\.(\w+)\.weight$", pattern) for pattern in conversion.source_patterns]
            if all(sources) and produces(conversion, f"{module}.{parameter}"):
                names += [match[1] for match in sources if match]
                break
    default = default_layout(layout.gated)
    return ExpertLayout(tuple(f"{{}}.{name}" for name in names)) if len(names) == len(default.paths) else default
