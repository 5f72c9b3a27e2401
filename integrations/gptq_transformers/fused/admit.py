"""Lets decoder layers run in few calls, after comparing the result with the layer's own."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import DynamicCache

from gptq_backend.kernels import cpu_attention, cpu_block

from ..experts.expert_list import ExpertList
from .calls import Calls
from .ending_forward import HeadForward, NormForward, join_ending
from .forward import FusedForward
from .match import NoMatch, Parts, find_parts, mlp_of
from .mixture import Found, find_pieces, find_rule
from .stack import join_loop, leave_loop

logger = logging.getLogger(__name__)

_TOKENS = 5  # of the comparison's prompt, longer than one row and no multiple of anything
_LIMIT = 1e-4  # relative difference in float32
# Of what a mixture gives for half of some tokens, in its own dtype: for others the last bit may choose another expert.
_LIMITS = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}


def fuse_layers(model: Any) -> int:
    """Replace the ``forward`` of the decoder layers that it can run in few calls -> how many.

    A layer is taken if its parts are known, and if two calls with a cache give, in float32, what its own code gives.
    Others stay as they are, and one line of the log says why. Nothing else of the model changes, nor does the state of
    random numbers.
    """
    if cpu_block.fusing_is_off():
        return 0
    reasons: dict[str, list[str]] = {}
    found: list[Parts] = []
    for layer in [module for module in model.modules() if hasattr(module, "self_attn") and mlp_of(module)]:
        with _refusing(layer, reasons):
            if "forward" in vars(layer):
                raise NoMatch("something else runs it already")
            found.append(find_parts(layer))
    inputs = _inputs(model, [parts.layer for parts in found]) if found else []
    admitted: dict[Any, str | None] = {}  # the pairs of layers that are alike
    rules: dict[Any, Found] = {}  # likewise of their routers
    count = 0
    for parts, given in zip(found, inputs):
        with _refusing(parts.layer, reasons):
            kind = _kind(parts)
            if kind not in admitted:
                admitted[kind] = _pairs(parts, given)
            if parts.known_mlp is None:
                with _refusing(parts.mlp, reasons):
                    parts = _with_mixture(parts, admitted[kind], kind, rules, given["hidden_states"].dtype)
            parts.layer.forward = FusedForward(parts, admitted[kind])
            count += 1
    apart: dict[str, list[str]] = {}
    if count:
        with _refusing(model, apart):
            join_ending(model, found[-1].layer)
    alone: dict[str, list[str]] = {}
    if count:
        with _refusing(model, alone):
            join_loop(model, [parts.layer for parts in found])
    for why in alone:
        logger.info(f"gptq-backend: layers are called one by one: {why}")
    for why in apart:
        logger.info(f"gptq-backend: norm and head do not run in the call of the layers: {why}")
    for why, names in reasons.items():
        logger.info(f"gptq-backend: {len(names)} {names[0]} run module by module: {why}")
    if count:
        logger.info(
            f"gptq-backend: {count} decoder layers run in few calls ({cpu_block.FUSE_VARIABLE}=0 turns that off)"
        )
    return count


def remove_fused(model: nn.Module) -> None:
    """Undo :func:`fuse_layers`: the layers run their own code, and nothing keeps their modules alive."""
    for module in model.modules():
        if isinstance(vars(module).get("forward"), FusedForward | NormForward | HeadForward):
            del module.forward
        leave_loop(module)


@contextmanager
def _refusing(layer: nn.Module, reasons: dict[str, list[str]]) -> Iterator[None]:
    """Note why ``layer`` stays as it is. No model fails to load because its code or values are unusual."""
    try:
        yield
    except NoMatch as why:
        reasons.setdefault(str(why), []).append(type(layer).__name__)
    except Exception as error:
        why_not = f"trying it failed ({type(error).__name__}: {error})"
        reasons.setdefault(why_not, []).append(type(layer).__name__)


def _kind(parts: Parts) -> tuple[Any, ...]:
    """Layers with the same need one comparison."""
    facts: list[Any] = [(each.in_features, each.out_features, each.bias is None) for each in parts.linears]
    facts += [type(module) for module in parts.layer.modules()]
    inside = {id(each) for module in parts.mlp.modules() if isinstance(module, ExpertList) for each in module.modules()}
    of_mlp = (module for module in parts.mlp.modules() if id(module) not in inside)
    for module in (parts.layer, parts.attention, *of_mlp):
        plain = {k: v for k, v in vars(module).items() if isinstance(v, (int, float, str, bool, type(None)))}
        plain.pop("layer_idx", None)
        facts.append(tuple(sorted(plain.items())))
    return (*facts, parts.known_mlp and parts.known_mlp.activation)


def _with_mixture(parts: Parts, pairs: str | None, kind: Any, rules: dict[Any, Found], dtype: torch.dtype) -> Parts:
    """The same parts, with those of the mixture that is called as it is.

    Raises:
        NoMatch: it is something else, or the call for all that follows the attention gives something else.
    """
    pieces = find_pieces(parts.mlp)
    known = kind in rules
    found = rules[kind] if known else find_rule(pieces, dtype)
    more = replace(parts, mixture=pieces.completed(found, dtype))
    if not known:
        calls = Calls(more, pairs)
        generator = torch.Generator().manual_seed(0)
        # Small, and nothing beside it: norms make it as large as it usually is.
        attended = 1e-2 * torch.randn(2, _TOKENS + 1, parts.o.in_features, generator=generator)
        residual = torch.zeros(2, _TOKENS + 1, parts.o.out_features, dtype=dtype)
        with torch.no_grad():
            h, _ = cpu_block.Output(parts.output())(attended.to(dtype), residual)
            given, wanted = (
                (each(attended.to(dtype), residual) - h).float() for each in (calls.finish, calls.finish_by_modules)
            )
        difference = float(((given - wanted).norm(dim=-1) / wanted.norm(dim=-1).clamp(min=1e-30)).median())
        if not difference < _LIMITS[dtype]:
            raise NoMatch(f"it computes something else than the fused calls (relative difference {difference:.1e})")
        rules[kind] = found
    return more


def _inputs(model: Any, layers: list[Any]) -> list[dict[str, Any]]:
    """What each layer is called with, from a short prompt that these layers let pass; nothing where that failed."""
    seen: list[dict[str, Any]] = [{} for _ in layers]

    def note(index: int) -> Any:
        def forward(hidden_states: Tensor, *arguments: Any, **kwargs: Any) -> Tensor:
            seen[index] = {"hidden_states": hidden_states, **kwargs}
            return hidden_states

        return forward

    inner = getattr(model, "base_model", model)  # without the head
    prompt = torch.arange(1, _TOKENS + 1)[None]
    try:
        for index, layer in enumerate(layers):
            layer.forward = note(index)
        with torch.no_grad(), torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            inner(input_ids=prompt, attention_mask=torch.ones_like(prompt), use_cache=True)
    except Exception as error:  # whatever the model wants more than tokens
        logger.info(f"gptq-backend: a prompt to see what layers are called with failed ({error})")
    finally:
        for layer in layers:
            del layer.forward
    return seen


def _pairs(parts: Parts, inputs: dict[str, Any]) -> str | None:
    """Which channels must turn together for the fused calls to give what the layer gives.

    Raises:
        NoMatch: none does.
    """
    if "hidden_states" not in inputs:
        raise NoMatch("a short prompt does not reach it")
    worst = float("inf")
    for pairs in _candidates(parts, inputs):
        difference = _difference(parts, FusedForward(parts, pairs), inputs)
        if difference < _LIMIT:
            return pairs
        worst = min(worst, difference)
    raise NoMatch(f"it computes something else than the fused calls (relative difference {worst:.1e})")


def _candidates(parts: Parts, inputs: dict[str, Any]) -> Iterator[str | None]:
    """Ways to turn by the angles that the layer is given; None: it does not."""
    angles = inputs.get("position_embeddings")
    if isinstance(angles, tuple):
        dims = angles[0].shape[-1]
        yield from (
            each for each in cpu_attention.PAIRS if cpu_attention.channels(each, dims) <= parts.attention.head_dim
        )
    yield None


def _difference(parts: Parts, fused: FusedForward, inputs: dict[str, Any]) -> float:
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
    with torch.no_grad(), _wide_norms(parts), _short_mlp(parts, inputs["hidden_states"].dtype):
        calls = [fused.serves(hidden, step) for hidden, step in steps]
        if calls[0] is None or calls[1] is None:
            raise NoMatch(
                f"it is being trained, its modules have hooks, or it is called with more ({', '.join(given)})"
            )
        try:
            attention.scaling = 1.0 / calls[0].typical_score(*steps[0])
            for run in (type(layer).forward.__get__(layer), calls[0].run):
                cache = DynamicCache()
                found = [run(hidden, **step | {"past_key_values": cache}) - hidden for hidden, step in steps]
                held = cache.layers[attention.layer_idx]
                results.append([*found, held.keys, held.values])
        finally:
            attention.scaling = scaling
    differences = [(a - b).norm() / a.norm().clamp(min=1e-30) for a, b in zip(*results)]
    return float(torch.stack(differences).max())  # NaN, if one of them is


@contextmanager
def _short_mlp(parts: Parts, dtype: torch.dtype) -> Iterator[None]:
    """Let an MLP that is called as it is return something simple, in the form of what it returns.

    A mixture has routers in 16 bits, whose choice would hang on the last bit.
    """
    mlp = parts.mlp
    if parts.known_mlp is not None:
        yield
        return
    own, before = mlp.forward, vars(mlp).get("forward")  # accelerate's, where it is offloaded

    def forward(x: Tensor) -> Any:  # a layer that gives it more fails here, because the calls would not
        y = own(x.to(dtype))
        return (x.tanh(), *y[1:]) if isinstance(y, tuple) else x.tanh()

    mlp.forward = forward
    try:
        yield
    finally:
        del mlp.forward
        if before is not None:
            mlp.forward = before


@contextmanager
def _wide_norms(parts: Parts) -> Iterator[None]:
    """Let norms take float32, which torch's own refuse where their weights are in 16 bits."""
    norms = [norm for norm in (*parts.norms, *parts.head_norms) if norm is not None]
    held = [(each, each.data) for norm in dict.fromkeys(norms) for each in norm.parameters()]
    for parameter, data in held:
        parameter.data = data.float()
    try:
        yield
    finally:
        for parameter, data in held:
            parameter.data = data


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
