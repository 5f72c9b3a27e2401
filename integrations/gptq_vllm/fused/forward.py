"""What runs in place of a decoder layer's own code: two calls, with vLLM's attention between them."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend.kernels import cpu_layer_halves

from ..compat import init_logger
from .match import NoMatch, Parts, find_parts

logger = init_logger(f"vllm.{__name__}")

_NAME = "_gptq_halves"


class Halves:
    """The two calls of a layer. Graphs read the keys of these when they run.

    Attributes:
        stale: whether a linear layer has another weight since. vLLM refuses that where graphs were made.
    """

    def __init__(self, parts: Parts) -> None:
        self.start = cpu_layer_halves.LayerStart(parts.before_attention, parts.inputs)
        self.end = cpu_layer_halves.LayerEnd(parts.tail)
        self.stale = False

    def renew(self, layer: Any) -> bool:
        """Take the weights that ``layer`` has now -> whether these calls can still run it; else it runs its own code.

        To be called when it runs: while vLLM reloads weights, norms and biases have none.
        """
        try:
            parts = find_parts(layer)
        except NoMatch as why:
            remove(layer)
            logger.info("%s runs module by module from now on: %s", type(layer).__name__, why)
            return False
        self.start.replace(parts.before_attention, parts.inputs)
        self.end.replace(parts.tail)
        self.stale = False
        return True


def install(parts: Parts) -> None:
    """Let the layer run in two calls. Its modules stay where they are."""
    layer, attention = parts.layer, parts.attention
    layer.__dict__[_NAME] = Halves(parts)
    layer.forward = MethodType(_forward, layer)
    # The attention's own code goes on calling these, around its norms, rotations and vLLM's attention.
    attention.qkv_proj.forward = attention.o_proj.forward = _as_it_is


def remove(layer: Any) -> None:
    """Undo :func:`install`."""
    for module in (layer, layer.self_attn.qkv_proj, layer.self_attn.o_proj):
        vars(module).pop("forward", None)
    layer.__dict__.pop(_NAME, None)


def halves_of(layer: nn.Module) -> Halves | None:
    found: Halves | None = layer.__dict__.get(_NAME)
    return found


def _as_it_is(x: Tensor) -> tuple[Tensor, None]:
    return x, None


def _forward(
    self: Any, positions: Tensor, hidden_states: Tensor, residual: Tensor | None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    """hidden_states, residual: float [T, H], whose sum is the layer's input -> likewise those of the next layer."""
    halves = self._gptq_halves
    if halves.stale and not halves.renew(self):
        return self(positions, hidden_states, residual, **kwargs)
    start, end = halves.start, halves.end
    operators = torch.ops.gptq_backend
    qkv, residual = operators.cpu_start_layer_inference(hidden_states, residual, start.key, start.outputs)
    attended = self.self_attn(positions=positions, hidden_states=qkv, **kwargs)
    hidden_states, residual = operators.cpu_end_layer_inference(attended, residual, end.key)
    return hidden_states, residual
