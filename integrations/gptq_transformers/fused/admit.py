"""Lets decoder layers run in few calls, after comparing the result with the layer's own."""

from __future__ import annotations

import logging
import os
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from gptq_backend.kernels import cpu_block

from .forward import FusedForward
from .match import NoMatch, find_parts

logger = logging.getLogger(__name__)

VARIABLE = "GPTQ_BACKEND_FUSE"
_TOKENS = 5  # of the comparison's prompt, longer than one row and no multiple of anything
_LIMIT = 1e-4  # relative difference in float32


def fuse_layers(model: Any) -> int:
    """Replace the ``forward`` of the decoder layers that it can run in few calls -> how many.

    A layer is taken if its parts are known, and if two calls with a cache give, in float32, what its own code gives.
    Others stay as they are, and one line of the log says why.
    """
    if os.environ.get(VARIABLE, "1") in ("0", "false"):
        return 0
    layers = [module for module in model.modules() if hasattr(module, "self_attn") and hasattr(module, "mlp")]
    reasons: dict[str, list[str]] = {}
    admitted: dict[Any, str | None] = {}  # the pairs of layers that are alike
    inputs: list[Any] | None = None
    count = 0
    for layer in layers:
        try:
            if "forward" in vars(layer):
                raise NoMatch("something else runs it already")
            parts = find_parts(layer)
            inputs = inputs or _first_inputs(model, layers)
            kind = _kind(parts)
            if kind not in admitted:
                admitted[kind] = _pairs(parts, inputs[layers.index(layer)])
            fused = FusedForward(parts, admitted[kind])
        except NoMatch as why:
            reasons.setdefault(str(why), []).append(type(layer).__name__)
            continue
        layer.forward = fused
        count += 1
    for why, names in reasons.items():
        logger.info(f"gptq-backend: {len(names)} {names[0]} run module by module: {why}")
    if count:
        logger.info(f"gptq-backend: {count} decoder layers run in few calls ({VARIABLE}=0 turns that off)")
    return count


def _kind(parts: Any) -> tuple[Any, ...]:
    """Layers with the same need one comparison."""
    facts = [(linear.in_features, linear.out_features, linear.bias is None) for linear in parts.linears]
    plain = {k: v for k, v in vars(parts.attention).items() if isinstance(v, (int, float, str, bool, type(None)))}
    plain.pop("layer_idx", None)
    return (type(parts.layer), tuple(facts), parts.activation, tuple(sorted(plain.items(), key=str)))


def _first_inputs(model: Any, layers: list[nn.Module]) -> list[dict[str, Any]]:
    """What the layers are called with, from a short prompt."""
    seen: list[dict[str, Any]] = [{} for _ in layers]

    def watch(index: int) -> Any:
        def hook(_: nn.Module, arguments: Any, kwargs: dict[str, Any]) -> None:
            seen[index] = {"hidden_states": arguments[0], **kwargs} if arguments else dict(kwargs)

        return hook

    handles = [layer.register_forward_pre_hook(watch(i), with_kwargs=True) for i, layer in enumerate(layers)]
    try:
        with torch.no_grad():
            model(input_ids=torch.arange(1, _TOKENS + 1)[None], use_cache=True)
    except Exception as error:  # whatever the model wants more than tokens
        raise NoMatch(f"a prompt to try it with failed ({type(error).__name__}: {error})") from None
    finally:
        for handle in handles:
            handle.remove()
    return seen


def _pairs(parts: Any, inputs: dict[str, Any]) -> str | None:
    """Which channels must turn together for the fused calls to give what the layer gives.

    Raises:
        NoMatch: none does.
    """
    worst = float("inf")
    for pairs in (*cpu_block.PAIRS, None):
        fused = FusedForward(parts, pairs)
        try:
            difference = _difference(parts, fused, inputs)
        except NoMatch:
            raise
        except Exception as error:
            raise NoMatch(
                f"its own code and the fused calls cannot be compared ({type(error).__name__}: {error})"
            ) from None
        if difference < _LIMIT:
            return pairs
        worst = min(worst, difference)
    raise NoMatch(f"it computes something else than the fused calls (relative difference {worst:.1e})")


def _difference(parts: Any, fused: FusedForward, inputs: dict[str, Any]) -> float:
    """Largest relative difference between the two in a prompt and one token more, in float32.

    The residual is left out, the cache is compared as well, and scores are scaled to be about 1: with what is small
    beside something else, nothing would be shown.
    """
    layer, attention = parts.layer, parts.attention
    given = {name: _float(value) for name, value in inputs.items()}
    width = given.pop("hidden_states").shape[-1]
    x = torch.randn(2, _TOKENS + 1, width, generator=torch.Generator().manual_seed(0))
    steps = (x[:, :_TOKENS], given), (x[:, _TOKENS:], _one_more(given))
    results: list[list[Tensor]] = []
    scaling = attention.scaling
    with torch.no_grad():
        if not all(fused.serves(hidden, step) for hidden, step in steps):
            raise NoMatch(
                f"it is being trained, its modules have hooks, or it is called with more ({', '.join(given)})"
            )
        try:
            attention.scaling = 1.0 / fused.typical_score(*steps[0])
            for run in (type(layer).forward.__get__(layer), fused.run):
                cache = DynamicCache()
                found = [run(hidden, **step | {"past_key_values": cache}) - hidden for hidden, step in steps]
                held = cache.layers[attention.layer_idx]
                results.append([*found, held.keys, held.values])
        finally:
            attention.scaling = scaling
    return max(float((a - b).norm() / a.norm()) for a, b in zip(*results))


def _one_more(given: dict[str, Any]) -> dict[str, Any]:
    """The arguments for one token after those."""
    step = given | {"attention_mask": None}
    if given.get("position_embeddings") is not None:
        step["position_embeddings"] = tuple(each[:, -1:].contiguous() for each in given["position_embeddings"])
    for name in ("position_ids", "cache_position"):
        if isinstance(ids := given.get(name), Tensor):
            step[name] = ids[..., -1:] + 1
    return step


def _float(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.float() if value.is_floating_point() else value
    if isinstance(value, tuple):
        return tuple(_float(each) for each in value)
    return value
