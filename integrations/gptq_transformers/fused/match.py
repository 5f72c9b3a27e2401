"""Finds the parts of a decoder layer that the fused calls can run: by its modules, not by its class."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend import QuantLinear
from gptq_backend.kernels import cpu_block

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": nn.functional.silu,
    "gelu": nn.functional.gelu,
    "gelu_tanh": lambda x: nn.functional.gelu(x, approximate="tanh"),
    "relu": nn.functional.relu,
    "relu_squared": lambda x: nn.functional.relu(x).square(),
}
# Where a layer has its norms: (before the attention, after it, before the MLP, after it).
_NORMS = (
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
    ("input_layernorm", None, "post_attention_layernorm", None),
    (None, "post_attention_layernorm", None, "post_feedforward_layernorm"),
)


class NoMatch(Exception):
    """Why a layer is left as it is."""


@dataclass(frozen=True)
class Parts:
    """The modules of a decoder layer.

    Args:
        inputs: q, k and v, or one module with the outputs of all.
        gate_up: gate and up, one module with the outputs of both, or up alone.
        gated: whether there is a gate.
        norms: before the attention, after it, before the MLP, after it.
        head_norms: of q and k; per head, or over all heads where they are as wide.
    """

    layer: Any
    attention: Any
    inputs: tuple[QuantLinear, ...]
    o: QuantLinear
    gate_up: tuple[QuantLinear, ...]
    gated: bool
    down: QuantLinear
    activation: str
    norms: tuple[Any, ...]
    head_norms: tuple[Any, Any]

    @property
    def linears(self) -> tuple[QuantLinear, ...]:
        return (*self.inputs, self.o, *self.gate_up, self.down)

    def modules(self) -> Iterator[nn.Module]:
        """All whose hooks or replacement would go unheard."""
        yield from (self.attention, self.layer.mlp, *self.linears)
        yield from (norm for norm in (*self.norms, *self.head_norms) if norm is not None)

    def tail(self) -> cpu_block.TailParts:
        """For the fused call."""
        _, after_attention, before_mlp, after_mlp = (norm_of(norm) for norm in self.norms)
        return cpu_block.TailParts(
            linear_of(self.o),
            tuple(map(linear_of, self.gate_up)),
            linear_of(self.down),
            self.activation,
            self.gated,
            after_attention=after_attention,
            before_mlp=before_mlp,
            after_mlp=after_mlp,
            factor=float(getattr(self.layer, "residual_multiplier", 1.0)),
        )


def find_parts(layer: Any) -> Parts:
    """The parts of ``layer``.

    Raises:
        NoMatch: it has others, or they are not quantized for these calls.
    """
    attention, mlp = getattr(layer, "self_attn", None), getattr(layer, "mlp", None)
    if attention is None or mlp is None:
        raise NoMatch("it has no self_attn and mlp")
    _check_code(layer)
    names = next((names for names in _NORMS if _has_norms(layer, names)), None)
    if names is None:
        raise NoMatch("its norms have other names")
    (o,), (down,) = _linears(attention, ("o_proj",)), _linears(mlp, ("down_proj",), ("c_proj",))
    activation = next((getattr(mlp, name) for name in ("act_fn", "activation_fn", "act") if hasattr(mlp, name)), None)
    parts = Parts(
        layer=layer,
        attention=attention,
        inputs=_linears(attention, ("q_proj", "k_proj", "v_proj"), ("qkv_proj",)),
        o=o,
        gate_up=_linears(mlp, ("gate_proj", "up_proj"), ("gate_up_proj",), ("up_proj",), ("c_fc",)),
        gated=hasattr(mlp, "gate_proj") or hasattr(mlp, "gate_up_proj"),
        down=down,
        activation=_activation(activation),
        norms=tuple(None if name is None else getattr(layer, name) for name in names),
        head_norms=(getattr(attention, "q_norm", None), getattr(attention, "k_norm", None)),
    )
    _check_children(parts)
    for linear in parts.linears:
        linear_of(linear)
    for norm in (*parts.norms, *parts.head_norms):
        norm_of(norm)
    return parts


def _check_code(layer: nn.Module) -> None:
    """A ``forward`` that another package put into a class wants to be called, even if it computes the same."""
    for kind in {type(module) for module in layer.modules()}:
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
    wanted = module(x)
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


def _activation(function: Any) -> str:
    if function is not None:
        x = torch.linspace(-8, 8, 257)
        wanted = function(x)
        for name, candidate in _ACTIVATIONS.items():
            if torch.allclose(wanted, candidate(x), rtol=1e-6, atol=1e-7):
                return name
    raise NoMatch("its activation is none that it knows")


def _check_children(parts: Parts) -> None:
    """Nothing with weights may be left out."""
    known = {id(module) for module in parts.modules()}
    for parent in (parts.layer, parts.attention, parts.layer.mlp):
        for name, tensor in (*parent._parameters.items(), *parent._buffers.items()):
            if tensor is not None:
                raise NoMatch(f"it has a {name} besides")
        for name, child in parent.named_children():
            if id(child) not in known and next(child.parameters(), None) is not None:
                raise NoMatch(f"it has a {name} besides")
