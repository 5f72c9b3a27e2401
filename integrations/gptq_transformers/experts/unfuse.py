"""Mixture-of-experts models: one linear layer per expert and projection, where transformers 5 has one 3-D parameter.

transformers >= 5 keeps a layer's experts in ``gate_up_proj`` [E, 2I, H] and ``down_proj`` [E, H, I] and fuses the
checkpoint's ``experts.{i}.gate_proj.weight`` into them while loading. GPTQ quantizes each expert's matrices for
themselves, and checkpoints hold ``experts.{i}.gate_proj.qweight``. So the fused module is replaced by an
:class:`ExpertList` with the checkpoint's names inside. transformers 4.x has such modules by itself: nothing here
finds anything to do there.

How names survive loading and saving, for a caller that is a transformers quantizer:

1. ``_process_model_before_weight_loading``: call :func:`replace_fused_experts` with the *model's* names of the
   quantized layers (``model.layers.0.mlp.experts.0.w1`` where the file says ``block_sparse_moe``), before putting
   ``QuantLinear`` in the place of linear layers.
2. ``update_weight_conversions``: return ``drop_fused_conversions(weight_conversions, model)``. Renamings stay.
3. Loading leaves the conversions that matched something in ``model._weight_conversions``, and ``save_pretrained``
   applies their inverse: ``.mlp.`` becomes ``.block_sparse_moe.`` again and nothing else has to be done. For a model
   that is quantized in memory, :func:`keep_packed_names` drops the same ones there.
4. Beware: for a pre-quantized model transformers gives tensors whose name was changed on loading the *file's* dtype,
   not the model's (``mlp.gate.weight`` of Mixtral). ``_process_model_after_weight_loading`` has to cast those.
"""

from __future__ import annotations

import dataclasses
import logging
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend import QuantLinear
from gptq_backend.errors import CheckpointError, ConfigError
from gptq_backend.format import ExpertLayout, default_layout, expert_layout, expert_renaming
from gptq_backend.model import is_linear, replace_module
from gptq_backend.modules import offloading_hook

from .expert_list import ExpertList, halves

logger = logging.getLogger(__name__)


_ROUTERS = ("gate", "router")


@dataclass(frozen=True)
class _Layout:
    """How a fused module stores its experts.

    Args:
        first: name of the parameter before the activation: ``gate_up_proj``, or ``up_proj`` where there is no gate.
        transposed: matrices are [in, out] instead of [out, in].
        concatenated: gate rows lie before up rows; otherwise they alternate.
        biased: there are ``{first}_bias`` [E, out] and ``down_proj_bias``.
    """

    first: str
    transposed: bool
    concatenated: bool
    biased: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        names = (self.first, "down_proj")
        return names + tuple(f"{name}_bias" for name in names) if self.biased else names

    @property
    def gated(self) -> bool:
        return self.first == "gate_up_proj"


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
    found = {}
    for name, module in model.named_modules():
        layout = _layout(module)
        if layout is not None:
            found[name] = layout
        elif any(parameter.dim() == 3 for key, parameter in module.named_parameters(recurse=False) if "proj" in key):
            logger.warning("%s (%s): its 3-D expert weights stay in 16 bits", name, type(module).__name__)
    conversions = _model_conversions(model) if found else []
    for name, layout in found.items():
        names = _projection_names(name, layout, conversions)
        replace_module(model, name, _unfused(model.get_submodule(name), layout, name, names))
    return list(found)


def group_experts(model: nn.Module) -> None:
    """Let the quantized experts of ``model`` be multiplied by grouped products, and log where they are not."""
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
    model: nn.Module, layers: Iterable[str], quantized: Iterable[str], halves: bool = False
) -> list[str]:
    """Prepare ``model``, still without weights, for a checkpoint with one tensor per expert.

    When any quantized layer is an expert's, all experts modules are replaced, also where a layer's experts are dense
    or mixed: such a checkpoint names them alike everywhere. Dense experts are plain ``nn.Linear``. The same where all
    are dense, but have names that transformers does not fuse.

    Args:
        model: a ``PreTrainedModel``.
        layers: full names of all the checkpoint's layers, as the model has them.
        quantized: those that are quantized.
        halves: see :class:`ExpertLayout`; counts where gate and up are apart.

    Returns:
        Names of the replaced modules.

    Raises:
        CheckpointError: the experts' layers have names that are not known.
    """
    found = {name: layout for name, module in model.named_modules() if (layout := _layout(module)) is not None}
    inside = tuple(f"{name}." for name in found)
    by_module: dict[str, list[str]] = {name: [] for name in found}
    for layer in layers if found else ():
        if layer.startswith(inside):
            by_module[next(name for name in _parents(layer) if name in found)].append(layer)
    if not any(by_module.values()):
        return []
    for name, inner in by_module.items():
        _check_complete(name, inner, model.get_parameter(f"{name}.down_proj").shape[0])
    conversions = _model_conversions(model)
    usual = {name: _projection_names(name, layout, conversions) for name, layout in found.items()}
    names = {name: expert_layout(name, by_module[name], layout.gated) or usual[name] for name, layout in found.items()}
    fuses = all(any(produces(each, f"{name}.down_proj") for each in conversions) for name in found)
    if fuses and names == usual and not any(name.startswith(inside) for name in quantized):
        return []  # dense, and transformers fuses them
    for name, layout in found.items():
        called = dataclasses.replace(names[name], halves=halves and not names[name].joined)
        replace_module(model, name, _unfused(model.get_submodule(name), layout, name, called))
    return list(found)


def _check_complete(module: str, layers: Iterable[str], count: int) -> None:
    """Raise if the ``layers`` inside ``module`` are of some of its ``count`` experts only."""
    numbers = {int(p) for layer in layers for p in layer.removeprefix(f"{module}.").split(".") if p.isdecimal()}
    if numbers and (absent := set(range(count)) - numbers):
        raise CheckpointError(
            f"{module}: the checkpoint has {len(numbers)} of the model's {count} experts (number {min(absent)} is not "
            "there); fetch all of its files, or export it again, since some tools write only the first expert"
        )


def expert_places(model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """The :func:`expert_renaming` for a checkpoint whose experts are in other places than the model's, or are called
    otherwise where the model has them as single layers; {} if there is nothing to rename.

    Args:
        model: a ``PreTrainedModel``, weights may be on meta.
        layers: full names of the checkpoint's layers, as far as transformers renames them by itself.

    Raises:
        CheckpointError: see :func:`expert_names.expert_renaming`.
    """
    layouts: dict[str, ExpertLayout | None] = {}
    for name, module in model.named_modules():
        if _layout(module) is not None:
            layouts[name] = None  # an ExpertList takes what the checkpoint has
        elif (own := _list_layout(name, module)) is not None:
            layouts[name] = own
    renaming = expert_renaming(layers, layouts)
    return renaming | _router_renaming(model, layouts, renaming, set(layers))


def _router_renaming(
    model: nn.Module, modules: Iterable[str], renaming: Mapping[str, str], layers: Collection[str]
) -> dict[str, str]:
    """Where the router beside the experts ``modules``, moved by ``renaming``, has its other name in the checkpoint."""
    stored = {wanted: own for own, wanted in renaming.items()}
    found = {}
    for parent in {module.rpartition(".")[0] for module in modules}:
        place = stored.get(f"{parent}.", f"{parent}.")
        for called, other in (_ROUTERS, _ROUTERS[::-1]):
            own = f"{place}{other}"
            if hasattr(model.get_submodule(parent), called) and own in layers and f"{place}{called}" not in layers:
                found[f"{own}."] = f"{parent}.{called}."
    return found


def _list_layout(name: str, module: nn.Module) -> ExpertLayout | None:
    """The layout of experts that the model itself has as a list of modules; None if it is not known."""
    if name.rpartition(".")[2] != "experts" or not isinstance(module, nn.ModuleList):
        return None
    layers = [f"{name}.{key}" for key, child in module.named_modules() if is_linear(child)]
    if len(layers) != 3 * len(module):
        return None
    try:
        return expert_layout(name, layers, gated=True)
    except CheckpointError:  # names of the model's own, which the checkpoint then has, too
        return None


def _parents(name: str) -> Iterable[str]:
    while name := name.rpartition(".")[0]:
        yield name


def drop_fused_conversions(weight_conversions: Sequence[Any], model: nn.Module) -> list[Any]:
    """``weight_conversions`` of transformers without those for a parameter that ``model`` no longer has: of fused
    experts, and of quantized layers, whose packed words cannot be cut and joined like the rows of a weight.

    Renamings stay, since the checkpoint's module names still differ from the model's. See the module's docstring for
    how this makes ``save_pretrained`` write the checkpoint's names.
    """
    gone = []
    for name, module in model.named_modules():
        if isinstance(module, ExpertList):
            gone += [f"{name}.{parameter}" for parameter in module.fused_names]
        elif isinstance(module, QuantLinear):
            gone += [f"{name}.weight", f"{name}.bias"]
    return [
        conversion
        for conversion in weight_conversions
        if not (hasattr(conversion, "operations") and any(produces(conversion, parameter) for parameter in gone))
    ]


def keep_packed_names(model: Any) -> None:
    """Let ``save_pretrained`` write the layers of a model that was quantized in memory by themselves, where it would
    join the model's q_proj, k_proj and v_proj into the one tensor of the original checkpoint.
    """
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:  # not loaded from files: save_pretrained takes the default, but no changes of prefix
        conversions = _model_conversions(model, add_legacy=False)
        conversions = [each for each in conversions if type(each).__name__ != "PrefixChange"]
    kept = drop_fused_conversions(conversions, model)
    if len(kept) < len(conversions):
        model._weight_conversions = kept


def converters(model: nn.Module) -> list[Any]:
    """The conversions of transformers for ``model``'s checkpoints that are no mere renamings; [] before version 5."""
    return [conversion for conversion in _model_conversions(model) if hasattr(conversion, "operations")]


def remaining_converters(model: nn.Module) -> list[Any]:
    """Those of :func:`converters` that transformers will apply while it loads ``model``."""
    return drop_fused_conversions(converters(model), model)


def _layout(module: nn.Module) -> _Layout | None:
    """None when the module holds no fused experts in the way of transformers' ``use_experts_implementation``."""
    if not hasattr(module, "is_transposed") or not hasattr(module, "has_bias"):
        return None
    parameters = dict(module.named_parameters(recurse=False))
    layout = _Layout(
        first="gate_up_proj" if getattr(module, "has_gate", True) else "up_proj",
        transposed=bool(module.is_transposed),
        concatenated=bool(getattr(module, "is_concatenated", True)),
        biased=bool(module.has_bias),
    )
    if set(parameters) != set(layout.parameters):
        return None
    return layout if all(parameters[name].dim() == 3 for name in (layout.first, "down_proj")) else None


def _unfused(fused: nn.Module, layout: _Layout, name: str, names: ExpertLayout) -> ExpertList:
    if offloading_hook(fused) is not None:
        raise ConfigError(
            f"{name}: its weights are offloaded to CPU or disk; load the model without offloading to split its experts"
        )
    experts = []
    for index in range(fused.get_parameter("down_proj").shape[0]):
        first = _matrices(fused, layout.first, index, layout, split=layout.gated and not names.joined)
        experts.append([_linear(*pair) for pair in (*first, *_matrices(fused, "down_proj", index, layout))])
    return ExpertList(fused, experts, names, layout.parameters)


def _matrices(
    fused: nn.Module, parameter: str, index: int, layout: _Layout, split: bool = False
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


def _model_conversions(model: nn.Module, **kwargs: Any) -> list[Any]:
    """How transformers turns the names and tensors of ``model``'s checkpoints into its own; [] before version 5."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    return list(get_model_conversion_mapping(model, **kwargs))


def _projection_names(module: str, layout: _Layout, conversions: Sequence[Any]) -> ExpertLayout:
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


def produces(conversion: Any, parameter: str) -> bool:
    """Whether one of the conversion's targets is the model parameter of that full name."""
    targets = (pattern.replace("\\", "").strip("^$") for pattern in conversion.target_patterns)
    return any(f"{target}." in f"{parameter}." for target in targets)  # some leave out the last .weight
