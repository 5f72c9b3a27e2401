"""Finds the parts of a decoder layer that the fused calls can run: by its modules, not by its class."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from gptq_backend import QuantLinear
from gptq_backend.kernels import cpu_block, cpu_dense, cpu_router, cpu_tail

from ..activations import name_of

SINKS = "sinks"  # of an attention: for each head the score of a position without a value
MLPS = ("mlp", "feed_forward", "block_sparse_moe")  # what layers call it
# Where a layer has its norms: (before the attention, after it, before the MLP, after it). One alone is before
# both, which read the same.
_NORMS = (
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ("input_layernorm", None, "post_attention_layernorm", None),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
    ("input_layernorm", None, "input_layernorm", None),
)


class NoMatch(Exception):
    """Why a layer is left as it is."""


@dataclass(frozen=True)
class MLP:
    """What a quantized MLP consists of.

    Args:
        gate_up: gate and up, one module with the outputs of both, or up alone.
        gated: whether there is a gate.
    """

    gate_up: tuple[QuantLinear, ...]
    gated: bool
    down: QuantLinear
    activation: str

    def part(self) -> cpu_tail.MLP:
        """For the fused call."""
        return cpu_tail.MLP(tuple(map(linear_of, self.gate_up)), linear_of(self.down), self.activation, self.gated)


Place = tuple[nn.Module, str]  # a module, and the name of a parameter or buffer of it


@dataclass(frozen=True)
class Mixture:
    """What a mixture of experts consists of, which nobody but its own code names.

    Args:
        experts: an ``ExpertList``.
        weight, bias, correction: where the tensors of the router are, of which the last two may be missing.
        mlp: what sees each token beside the experts, or None.
        mlp_gate: the linear layer whose sigmoid says what that counts, or None.
        dtype: in which it was compared.
    """

    block: Any
    experts: Any
    weight: Place
    bias: Place | None
    correction: Place | None
    mlp: MLP | None
    mlp_gate: Any
    rule: cpu_router.Rule
    dtype: torch.dtype

    @property
    def linears(self) -> tuple[QuantLinear, ...]:
        return () if self.mlp is None else (*self.mlp.gate_up, self.mlp.down)

    @property
    def places(self) -> list[Place]:
        """Of all tensors but those of quantized layers."""
        gate = [] if self.mlp_gate is None else [(self.mlp_gate, "weight"), (self.mlp_gate, "bias")]
        return [place for place in (self.weight, self.bias, self.correction, *gate) if place is not None]

    def modules(self) -> list[nn.Module]:
        """All but those inside the experts."""
        inside = {id(module) for module in self.experts.modules()} - {id(self.experts)}
        return [module for module in self.block.modules() if id(module) not in inside]

    def part(self) -> cpu_tail.Mixture | None:
        """For the fused call, if the experts run in one."""
        grouped = self.experts.grouped
        if grouped is None or grouped.one_call is None:
            return None
        weight, bias, correction = map(tensor_at, (self.weight, self.bias, self.correction))
        router = cpu_router.RouterParts(cpu_dense.Dense(weight, bias), self.rule, correction)
        gate = self.mlp_gate
        return cpu_tail.Mixture(router, grouped.one_call, None if gate is None else dense_of(gate))


def tensor_at(place: Place | None) -> Any:
    """The tensor, as a vector where all but one of its dimensions are 1; None where there is none."""
    if place is None:
        return None
    module, name = place
    found = module._parameters.get(name, module._buffers.get(name))
    return found if found is None or max(found.shape, default=1) != found.numel() else found.detach().view(-1)


def dense_of(linear: nn.Linear) -> cpu_dense.Dense:
    """For the fused calls.

    Raises:
        NoMatch: its tensors are no parameters: a hook (pruning, weight norm) makes them anew before each call.
    """
    if any(getattr(linear, name) is not linear._parameters.get(name) for name in ("weight", "bias")):
        raise NoMatch("its weight or bias is no parameter")
    return cpu_dense.Dense(linear.weight.detach(), None if linear.bias is None else linear.bias.detach())


@dataclass(frozen=True)
class Parts:
    """The modules of a decoder layer.

    Args:
        mlp: the module that follows the attention.
        inputs: q, k and v, or one module with the outputs of all.
        known_mlp: what ``mlp`` consists of; None: it is something else.
        mixture: likewise, if it is a mixture. Where both are None, it is called as it is.
        norms: before the attention, after it, before the MLP, after it.
        head_norms: of q and k; per head, or over all heads where they are as wide.
    """

    layer: Any
    attention: Any
    mlp: Any
    inputs: tuple[QuantLinear, ...]
    o: QuantLinear
    known_mlp: MLP | None
    norms: tuple[Any, ...]
    head_norms: tuple[Any, Any]
    mixture: Mixture | None = None

    @property
    def linears(self) -> tuple[QuantLinear, ...]:
        mlp, mixture = self.known_mlp, self.mixture
        of_mlp = () if mlp is None else (*mlp.gate_up, mlp.down)
        return (*self.inputs, self.o, *of_mlp, *(() if mixture is None else mixture.linears))

    @property
    def parents(self) -> tuple[nn.Module, ...]:
        """Those whose code is not run."""
        return (self.layer, self.attention, *(() if self.known_mlp is None else (self.mlp,)))

    def modules(self) -> list[nn.Module]:
        """All whose hooks, code or replacement would go unheard, but those of a mixture; the layer is the first."""
        called = set() if self.known_mlp is not None else set(self.mlp.modules())
        return [module for module in self.layer.modules() if module not in called]

    @property
    def factor(self) -> float:
        """Of what is added to the residual."""
        return float(getattr(self.layer, "residual_multiplier", 1.0))

    def output(self) -> cpu_block.OutputParts:
        """For the fused call."""
        before_attention, after_attention, before_mlp, _ = self.norms
        parallel = before_mlp is not None and before_mlp is before_attention
        norms = norm_of(after_attention), norm_of(before_mlp)
        return cpu_block.OutputParts(linear_of(self.o), *norms, self.factor, parallel)

    def tail(self) -> cpu_tail.TailParts | None:
        """For the fused call, if there can be one for all that follows the attention."""
        mixture = None if self.mixture is None else self.mixture.part()
        mlp = self.known_mlp if mixture is None or self.mixture is None else self.mixture.mlp
        if mlp is None and mixture is None:
            return None
        return cpu_tail.TailParts(self.output(), None if mlp is None else mlp.part(), mixture, norm_of(self.norms[3]))


def find_parts(layer: Any) -> Parts:
    """The parts of ``layer``.

    Raises:
        NoMatch: it has others, or they are not quantized for these calls.
    """
    attention, mlp = getattr(layer, "self_attn", None), mlp_of(layer)
    if attention is None or mlp is None:
        raise NoMatch("it has no self_attn and mlp")
    names = next((names for names in _NORMS if _has_norms(layer, names)), None)
    if names is None:
        raise NoMatch("its norms have other names")
    (o,) = _linears(attention, ("o_proj",), ("dense",))
    parts = Parts(
        layer=layer,
        attention=attention,
        mlp=mlp,
        inputs=_linears(attention, ("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
        o=o,
        known_mlp=known_mlp(mlp),
        norms=tuple(None if name is None else getattr(layer, name) for name in names),
        head_norms=(getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)),
    )
    _check_code(parts)
    _check_children(parts)
    for linear in parts.linears:
        linear_of(linear)
    for norm in (*parts.norms, *parts.head_norms):
        norm_of(norm)
    return parts


def mlp_of(layer: Any) -> Any:
    """The module behind the attention, or None."""
    return next((getattr(layer, name) for name in MLPS if hasattr(layer, name)), None)


def known_mlp(module: Any) -> MLP | None:
    """Its parts, if they are all quantized, and the activation is known."""
    try:
        (down,) = _linears(module, ("down_proj",), ("c_proj",), ("fc2",))
        gate_up = _linears(module, ("gate_proj", "up_proj"), ("gate_up_proj",), ("up_proj",), ("c_fc",), ("fc1",))
    except NoMatch:
        return None
    functions = [getattr(module, name) for name in ("act_fn", "activation_fn", "act") if hasattr(module, name)]
    activation = name_of(functions[0]) if functions else None
    if activation is None:
        return None
    gated = hasattr(module, "gate_proj") or hasattr(module, "gate_up_proj")
    mlp = MLP(gate_up, gated, down, activation)
    return mlp if {id(each) for each in (*gate_up, down)} == with_weights(module) else None


def with_weights(module: nn.Module) -> set[int]:
    """``id`` of the modules inside that hold a tensor themselves."""
    inside = ((each, *each._parameters.values(), *each._buffers.values()) for each in module.modules())
    return {id(each) for each, *tensors in inside if any(tensor is not None for tensor in tensors)}


def _check_code(parts: Parts) -> None:
    """A ``forward`` that another package put into a class wants to be called, even if it computes the same."""
    for kind in {type(module) for module in parts.modules()}:
        known = {"torch", "transformers", *(each.__module__.partition(".")[0] for each in kind.__mro__)}
        function: Any = kind.forward
        while function is not None:
            if getattr(function, "__globals__", {}).get("__name__", "").partition(".")[0] not in known:
                raise NoMatch(f"somebody patched {kind.__name__}.forward")
            function = getattr(function, "__wrapped__", None)


def linear_of(layer: QuantLinear) -> cpu_block.Linear:
    """For the fused calls."""
    weight, bias = layer.prepared, layer.bias
    if weight is None:
        raise NoMatch(f"{layer.name} is not prepared")
    if (why := cpu_block.why_not(weight, bias)) is not None:
        raise NoMatch(f"of {layer.name}, {why}")
    return cpu_block.Linear(weight, bias)


def norm_of(module: Any) -> cpu_block.Norm | None:
    """What ``module`` computes, found by trying.

    Raises:
        NoMatch: something else than a norm.
    """
    if module is None:
        return None
    weight, bias = (module._parameters.get(name) for name in ("weight", "bias"))
    size = None if weight is None else weight.shape[0]
    eps = next((getattr(module, name) for name in ("variance_epsilon", "eps") if hasattr(module, name)), None)
    if size is None or not isinstance(eps, float) or weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise NoMatch(f"{type(module).__name__} is no norm that it knows")
    x = torch.randn(2, size, generator=torch.Generator().manual_seed(0)) + 0.5
    wide = copy.copy(module)  # torch's own norms take no input that is wider than their weights
    wide._parameters = {name: None if each is None else each.float() for name, each in module._parameters.items()}
    wanted = type(module).forward(wide, x)
    for centered in (False, True):
        for offset in (0.0, 1.0):
            mean = x.mean(-1, keepdim=True) if centered else 0.0
            deviation = ((x - mean).square().mean(-1, keepdim=True) + eps).sqrt()
            y = (x - mean) / deviation * (weight.float() + offset) + (0.0 if bias is None else bias.float())
            if torch.allclose(y, wanted.float(), rtol=1e-4, atol=1e-4):
                return cpu_block.Norm(weight.detach(), None if bias is None else bias.detach(), eps, offset, centered)
    raise NoMatch(f"{type(module).__name__} computes something else than a norm")


def _has_norms(layer: Any, names: tuple[str | None, ...]) -> bool:
    present = {name for name, _ in layer.named_children() if "norm" in name}
    return present == {name for name in names if name is not None}


def _linears(parent: Any, *choices: tuple[str, ...]) -> tuple[QuantLinear, ...]:
    for names in choices:
        found = [getattr(parent, name, None) for name in names]
        if all(isinstance(each, QuantLinear) for each in found):
            return tuple(found)  # type: ignore[arg-type]
    raise NoMatch(f"its {' or '.join(', '.join(names) for names in choices)} are not all quantized")


def _check_children(parts: Parts) -> None:
    """Nothing with weights may be left out."""
    known = {*map(id, parts.linears), *map(id, parts.norms), *map(id, parts.head_norms), id(parts.mlp)}
    for parent in (parts.layer, parts.attention):
        for name, tensor in (*parent._parameters.items(), *parent._buffers.items()):
            if tensor is not None and (parent, name) != (parts.attention, SINKS):
                raise NoMatch(f"it has a {name} besides")
        for name, child in parent.named_children():
            if child is not parts.attention and id(child) not in known and with_weights(child):
                raise NoMatch(f"it has a {name} besides")
