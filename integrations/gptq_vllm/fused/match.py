"""Finds the parts of a decoder layer that the two calls can run: by its modules, not by its class."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from gptq_backend.kernels import cpu_block, cpu_tail

from ..fused_weight import FusedWeight, QuantizedSegment

# Where a layer has its norms: (before the attention, after it, before the MLP, after it).
_NORMS = (
    ("input_layernorm", None, "post_attention_layernorm", None),
    ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm"),
    ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
)
_OFFSETS = {"RMSNorm": 0.0, "GemmaRMSNorm": 1.0}  # of a norm's weight, by its class
_ACTIVATIONS = {
    ("SiluAndMul", None): "silu",
    ("GeluAndMul", "none"): "gelu",
    ("GeluAndMul", "tanh"): "gelu_tanh",
}  # by the class and what it says of itself
_ARGUMENTS = ["self", "positions", "hidden_states", "residual"]


class NoMatch(Exception):
    """Why a layer is left as it is."""


@dataclass(frozen=True)
class Parts:
    """What the two calls of a decoder layer are made of.

    Args:
        name: vLLM's, of its output projection.
        before_attention, inputs: for the call before the attention.
        tail: for the call that follows.
    """

    layer: Any
    name: str
    before_attention: cpu_block.Norm | None
    inputs: tuple[cpu_block.Linear, ...]
    tail: cpu_tail.TailParts


def is_layer(module: Any) -> bool:
    """Whether it looks like a decoder layer; see :func:`find_parts`."""
    return all(isinstance(getattr(module, name, None), nn.Module) for name in ("self_attn", "mlp"))


def on_cpu(linear: Any) -> bool:
    """Whether kernels of the CPU serve a piece of vLLM's ``linear``."""
    return any(
        cpu_block.why_not(part.prepared) is None for part in linear.segments.parts if isinstance(part, QuantizedSegment)
    )


def find_parts(layer: Any) -> Parts:
    """The parts of ``layer``.

    Raises:
        NoMatch: it has others, or they are not quantized for these calls.
    """
    arguments = list(inspect.signature(type(layer).forward).parameters)
    if arguments[: len(_ARGUMENTS)] != _ARGUMENTS:
        raise NoMatch(f"its forward takes {', '.join(arguments[1:])}")
    names = next((names for names in _NORMS if _norm_names(layer) == {*names} - {None}), None)
    if names is None:
        raise NoMatch(f"its norms are {', '.join(sorted(_norm_names(layer)))}")
    attention, mlp = layer.self_attn, layer.mlp
    if not isinstance(getattr(attention, "attn", None), nn.Module):
        raise NoMatch("its attention has no attn")
    _only(layer, "it", {"self_attn", "mlp", *names})
    _only(mlp, "its mlp", {"gate_up_proj", "down_proj", "act_fn"})
    before_attention, after_attention, before_mlp, after_mlp = (_norm(layer, name) for name in names)
    output = cpu_block.OutputParts(_one(attention, "o_proj"), after_attention, before_mlp)
    gated = cpu_tail.MLP(_linears(mlp, "gate_up_proj"), _one(mlp, "down_proj"), _activation(mlp))
    tail = cpu_tail.TailParts(output, gated, after_mlp=after_mlp)
    return Parts(layer, attention.o_proj.prefix, before_attention, _linears(attention, "qkv_proj"), tail)


def _norm_names(layer: nn.Module) -> set[str]:
    return {name for name, _ in layer.named_children() if "norm" in name}


def _only(parent: nn.Module, called: str, names: Iterable[str | None]) -> None:
    """Nothing with weights may be left out."""
    children = [name for name, child in parent.named_children() if any(True for _ in child.parameters())]
    own = [name for name, _ in (*parent.named_parameters(recurse=False), *parent.named_buffers(recurse=False))]
    for name in (*children, *own):
        if name not in names:
            raise NoMatch(f"{called} also has a {name}")


def _norm(layer: Any, name: str | None) -> cpu_block.Norm | None:
    if name is None:
        return None
    norm = getattr(layer, name)
    offset = _OFFSETS.get(type(norm).__name__)
    if offset is None or getattr(norm, "variance_size_override", None) is not None:
        raise NoMatch(f"its {name} is a {type(norm).__name__}")
    weight = norm.weight.detach() if isinstance(norm.weight, nn.Parameter) else None
    return cpu_block.Norm(weight, None, float(norm.variance_epsilon), offset)


def _activation(mlp: Any) -> str:
    kind = type(mlp.act_fn).__name__, getattr(mlp.act_fn, "approximate", None)
    if kind not in _ACTIVATIONS:
        raise NoMatch(f"its activation is a {kind[0]}")
    return _ACTIVATIONS[kind]


def _one(parent: Any, name: str) -> cpu_block.Linear:
    linears = _linears(parent, name)
    if len(linears) != 1:
        raise NoMatch(f"its {name} is in several pieces")
    return linears[0]


def _linears(parent: Any, name: str) -> tuple[cpu_block.Linear, ...]:
    """Those side by side that vLLM's linear layer consists of."""
    linear = getattr(parent, name, None)
    segments = getattr(linear, "segments", None)
    if linear is None or not isinstance(segments, FusedWeight):
        raise NoMatch(f"its {name} is not quantized")
    if linear.tp_size != 1:
        raise NoMatch(f"ranks share its {name}")
    if linear.skip_bias_add or not linear.return_bias:
        raise NoMatch(f"its {name} leaves its bias to others, or returns none")
    sizes = [part.out_features for part in segments.parts]
    biases = [None] * len(sizes) if linear.bias is None else linear.bias.detach().split(sizes)
    return tuple(_linear(part, bias, name) for part, bias in zip(segments.parts, biases))


def _linear(part: Any, bias: Tensor | None, name: str) -> cpu_block.Linear:
    if not isinstance(part, QuantizedSegment):
        raise NoMatch(f"a piece of its {name} is not quantized")
    if part.extra_bias is not None:
        if bias is not None:
            raise NoMatch(f"its {name} has two biases")
        bias = part.extra_bias.detach()
    if (why := cpu_block.why_not(part.prepared, bias)) is not None:
        raise NoMatch(f"of its {name}, {why}")
    return cpu_block.Linear(part.prepared, bias)
