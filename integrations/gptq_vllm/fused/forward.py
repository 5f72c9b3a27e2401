"""What runs in place of a decoder layer's own code: two calls, with the layer's own attention between them."""

from __future__ import annotations

import copy
from types import MethodType
from typing import Any

from torch import Tensor, nn

from gptq_backend.kernels import cpu_layer_halves

from ..compat import init_logger
from .match import NoMatch, Parts, find_parts

logger = init_logger(f"vllm.{__name__}")

_NAME = "_gptq_calls"


class LayerCalls:
    """The two calls of a layer, and a view of its attention whose qkv_proj and o_proj give what they are given."""

    def __init__(self, parts: Parts) -> None:
        self.start = cpu_layer_halves.LayerStart(parts.before_attention, parts.inputs)
        self.end = cpu_layer_halves.LayerEnd(parts.tail)
        # No child of the layer, whose modules stay as they are: others may call them.
        self.attention = copy.copy(parts.layer.self_attn)
        self.attention._modules = parts.layer.self_attn._modules | {"qkv_proj": _Identity(), "o_proj": _Identity()}


class _Identity(nn.Module):
    """As vLLM's linear layers: with a bias that is still to be added."""

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        return x, None


def install(parts: Parts) -> None:
    """Let the layer run in two calls."""
    parts.layer.__dict__[_NAME] = LayerCalls(parts)
    parts.layer.forward = MethodType(_forward, parts.layer)


def is_installed(layer: nn.Module) -> bool:
    return _NAME in layer.__dict__


def remove(layer: Any) -> None:
    """Undo :func:`install`."""
    layer.__dict__.pop(_NAME, None)
    layer.__dict__.pop("forward", None)


def renew(layer: Any) -> None:
    """Take the weights that ``layer`` has when it is called next. While vLLM loads them, others have none."""
    remove(layer)
    layer.forward = MethodType(_first_forward, layer)


def _first_forward(layer: Any, *arguments: Any, **kwargs: Any) -> Any:
    del layer.forward
    try:
        install(find_parts(layer))
    except NoMatch as why:
        logger.info("A %s runs module by module from now on: %s", type(layer).__name__, why)
    return layer(*arguments, **kwargs)


def _forward(
    layer: Any, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, *more: Any, **kwargs: Any
) -> Any:
    """hidden_states, residual: float [T, H], whose sum is the layer's input -> likewise those of the next layer."""
    if any(each is not None for each in (*more, *kwargs.values())):
        return type(layer).forward(layer, positions, hidden_states, residual, *more, **kwargs)
    calls = layer._gptq_calls
    qkv, residual = calls.start(hidden_states, residual)
    attended = calls.attention(positions=positions, hidden_states=qkv)
    return calls.end(attended, residual)
