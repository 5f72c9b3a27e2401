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
   applies their inverse: ``.mlp.`` becomes ``.block_sparse_moe.`` again and nothing else has to be done. A model that
   was not loaded that way (quantized in memory) gets transformers' default list there; its fusing conversions,
   inverted, look for ``experts.gate_up_proj``, which no longer exists, so they do nothing.
4. Beware: for a pre-quantized model transformers gives tensors whose name was changed on loading the *file's* dtype,
   not the model's (``mlp.gate.weight`` of Mixtral). ``_process_model_after_weight_loading`` has to cast those.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend.errors import ConfigError
from gptq_backend.linear import QuantLinear, changing_layout
from gptq_backend.moe import Routing
from gptq_backend.structure import replace_module

from .grouped import GroupedExperts

logger = logging.getLogger(__name__)


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
    def default_names(self) -> tuple[str, ...]:
        """Of the projections, where transformers has no conversion that tells."""
        return ("gate_proj", "up_proj", "down_proj") if self.first == "gate_up_proj" else ("up_proj", "down_proj")


class ExpertList(nn.Module):
    """Experts as children "0", "1", ...; each an ``nn.ModuleDict`` of its projections, in the order gate, up, down.

    Args:
        fused: the module that it replaces; its settings and its activation are taken over, its parameters are not.
        experts: one per expert.
        fused_names: the parameters of ``fused`` that the experts stand for.
    """

    def __init__(self, fused: nn.Module, experts: Sequence[nn.ModuleDict], fused_names: tuple[str, ...]) -> None:
        super().__init__()
        self.fused_class, self.fused_names = type(fused), fused_names
        for key, value in vars(fused).items():  # what the class's _apply_gate reads: clamping limits and the like
            if not key.startswith("_") and key not in ("training", "forward"):
                setattr(self, key, value)
        self.num_experts = len(experts)
        for name, child in fused.named_children():
            self.add_module(name, child)
        for i, expert in enumerate(experts):
            self.add_module(str(i), expert)
        self.training = fused.training
        self._grouped: GroupedExperts | None = None

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' outputs; an expert without tokens does not run.

        Args:
            hidden_states: float [T, H].
            top_k_index: int [T, k], expert of each slot; entries >= num_experts count for nothing.
            top_k_weights: float [T, k].

        Returns:
            [T, H] in the dtype of ``hidden_states``.
        """
        grouped = self._grouped
        if grouped is None or not grouped.current():
            grouped = self._group()
        if not grouped.serve(hidden_states):
            return self._by_expert(hidden_states, top_k_index, top_k_weights)
        routing = Routing(top_k_index, self.num_experts)
        outputs = [y for call in grouped.before for y in call(hidden_states, routing, top_k_index.shape[1])]
        y = self._after(grouped.after[0](self._activate(outputs), routing, 1)[0]).unflatten(0, top_k_index.shape)
        weights = top_k_weights.float()
        if "post_expert_norm" in self._modules:  # it need not take zeros to zeros
            weights = weights.masked_fill((top_k_index < 0) | (top_k_index >= self.num_experts), 0)
        return (y.float() * weights.unsqueeze(-1)).sum(1).to(hidden_states.dtype)

    # The loop depends on the data, so a graph would break at every expert; break once around all of them.
    @torch.compiler.disable
    def _by_expert(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What :meth:`forward` says, one expert after the other; works for layers of any kind."""
        output = torch.zeros_like(hidden_states)
        for index in top_k_index.unique().tolist():
            if not 0 <= index < self.num_experts:
                continue
            # In ascending token order: calibration may tell the rows of padding only while rows are in place.
            tokens, slots = torch.where(top_k_index == index)
            result = self.expert(index, hidden_states[tokens]) * top_k_weights[tokens, slots, None]
            output.index_add_(0, tokens, result.to(output.dtype))
        return output

    def expert(self, index: int, x: Tensor) -> Tensor:
        """Expert ``index`` applied to x [T, H] -> [T, H]."""
        *before, down = self._modules[str(index)].values()  # type: ignore[union-attr,operator]
        outputs = [projection(x) for projection in before]
        return self._after(down(self._activate(outputs)))

    def group(self) -> list[str]:
        """Multiply all experts in one call, where they allow it -> the obstacles, where they do not."""
        return self._group().obstacles

    @torch.compiler.disable
    @changing_layout()
    def _group(self) -> GroupedExperts:
        grouped = self._grouped
        if grouped is None or not grouped.current():
            experts: Any = [self._modules[str(i)] for i in range(self.num_experts)]
            self._grouped = grouped = GroupedExperts(experts)
        return grouped

    def ungroup(self) -> None:
        """Forget what :meth:`group` found; the next call finds it again."""
        self._grouped = None

    def _after(self, y: Tensor) -> Tensor:
        norm = self._modules.get("post_expert_norm")
        return y if norm is None else norm(y)

    def _activate(self, outputs: list[Tensor]) -> Tensor:
        if len(outputs) == 1:
            return self.act_fn(outputs[0])  # type: ignore[operator]
        apply_gate = getattr(self.fused_class, "_apply_gate", None)
        if apply_gate is None:
            return self.act_fn(outputs[0]) * outputs[1]  # type: ignore[operator]
        joined = torch.cat(outputs, -1) if self._concatenated else torch.stack(outputs, -1).flatten(-2)
        return apply_gate(self, joined)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ExpertList:
        super()._apply(fn, recurse)
        if self._grouped is not None and not self._grouped.current():  # a cast changes no layer
            self.ungroup()
            if all(layer.kernel is not None for layer in self.modules() if isinstance(layer, QuantLinear)):
                self.group()
        return self

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *args: Any) -> None:
        if any(key.startswith(prefix) for key in state_dict):
            self.ungroup()  # layers that change one after the other would each keep their old stack alive
        super()._load_from_state_dict(state_dict, prefix, *args)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_grouped": None}

    @property
    def _concatenated(self) -> bool:
        return bool(getattr(self, "is_concatenated", True))


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
        replace_module(model, name, _unfused(model.get_submodule(name), layout, name, conversions))
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


def replace_fused_experts(model: nn.Module, quantized_modules: Iterable[str]) -> list[str]:
    """Prepare ``model``, still without weights, for a checkpoint with one tensor per expert.

    When any quantized layer is an expert's, all experts modules are replaced, also where a layer's experts are dense
    or mixed: such a checkpoint names them alike everywhere. Dense experts are plain ``nn.Linear``.

    Args:
        quantized_modules: names of the quantized layers as the model has them.

    Returns:
        Names of the replaced modules.
    """
    fused = tuple(f"{name}." for name, module in model.named_modules() if _layout(module) is not None)
    if not fused or not any(name.startswith(fused) for name in quantized_modules):
        return []
    return unfuse_experts(model)


def drop_fused_conversions(weight_conversions: Sequence[Any], model: nn.Module) -> list[Any]:
    """``weight_conversions`` of transformers without those for a fused parameter that ``model`` no longer has.

    Renamings stay, since the checkpoint's module names still differ from the model's. See the module's docstring for
    how this makes ``save_pretrained`` write the checkpoint's names.
    """
    gone = [
        f"{name}.{parameter}"
        for name, module in model.named_modules()
        if isinstance(module, ExpertList)
        for parameter in module.fused_names
    ]
    return [
        conversion
        for conversion in weight_conversions
        if not (hasattr(conversion, "operations") and any(_produces(conversion, parameter) for parameter in gone))
    ]


def remaining_converters(model: nn.Module) -> list[Any]:
    """The conversions, none of them a mere renaming, that transformers will apply while it loads ``model``."""
    conversions = drop_fused_conversions(_model_conversions(model), model)
    return [conversion for conversion in conversions if hasattr(conversion, "operations")]


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


def _unfused(fused: nn.Module, layout: _Layout, name: str, conversions: Sequence[Any]) -> ExpertList:
    hook = getattr(fused, "_hf_hook", None)
    if any(getattr(item, "offload", False) for item in getattr(hook, "hooks", [hook])):
        raise ConfigError(
            f"{name}: its weights are offloaded to CPU or disk; load the model without offloading to split its experts"
        )
    names = _projection_names(name, layout, conversions)
    experts = []
    for index in range(fused.down_proj.shape[0]):  # type: ignore[index,union-attr]
        matrices = [*_matrices(fused, layout.first, index, layout), *_matrices(fused, "down_proj", index, layout)]
        experts.append(nn.ModuleDict({key: _linear(*pair) for key, pair in zip(names, matrices, strict=True)}))
    return ExpertList(fused, experts, layout.parameters)


def _matrices(fused: nn.Module, parameter: str, index: int, layout: _Layout) -> list[tuple[Tensor, Tensor | None]]:
    """Weight [N, K] and bias [N] of each projection that lies in ``parameter`` of expert ``index``; views."""
    weight = getattr(fused, parameter)[index]
    weight = weight.t() if layout.transposed else weight
    bias = getattr(fused, f"{parameter}_bias")[index] if layout.biased else None
    if parameter != "gate_up_proj":
        return [(weight, bias)]
    return list(zip(_halves(weight, layout), (None, None) if bias is None else _halves(bias, layout), strict=True))


def _halves(tensor: Tensor, layout: _Layout) -> tuple[Tensor, Tensor]:
    if not layout.concatenated:
        return tensor[::2], tensor[1::2]
    gate, up = tensor.chunk(2)
    return gate, up


def _linear(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    """Copies, not views: each is freed by itself once quantized, and safetensors refuses shared storage."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
    trainable = weight.requires_grad
    linear.weight = nn.Parameter(weight.detach().clone(memory_format=torch.contiguous_format), trainable)
    if bias is not None:
        linear.bias = nn.Parameter(bias.detach().clone(memory_format=torch.contiguous_format), trainable)
    return linear


def _model_conversions(model: nn.Module) -> list[Any]:
    """How transformers turns the names and tensors of ``model``'s checkpoints into its own; [] before version 5."""
    try:
        from transformers.conversion_mapping import get_model_conversion_mapping
    except ImportError:
        return []
    return list(get_model_conversion_mapping(model))


def _projection_names(module: str, layout: _Layout, conversions: Sequence[Any]) -> tuple[str, ...]:
    """Gate, up and down as the checkpoint calls them: ``*.w1.weight``, ``*.w3.weight`` become ``gate_up_proj``."""
    names: list[str] = []
    for parameter in (layout.first, "down_proj"):
        for conversion in conversions:
            sources = [re.search(r"\*\.(\w+)\.weight$", pattern) for pattern in conversion.source_patterns]
            if all(sources) and _produces(conversion, f"{module}.{parameter}"):
                names += [match[1] for match in sources if match]
                break
    return tuple(names) if len(names) == len(layout.default_names) else layout.default_names


def _produces(conversion: Any, parameter: str) -> bool:
    """Whether one of the conversion's targets is the model parameter of that full name."""
    targets = (pattern.replace("\\", "").strip("^$") for pattern in conversion.target_patterns)
    return any(parameter.endswith(target) for target in targets)
