"""Finds what a mixture of experts computes: its parts by their modules, the rule of its router by trying."""

from __future__ import annotations

import copy
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend.kernels import cpu_dense, cpu_router

from ..experts.expert_list import ExpertList
from .match import MLP, Mixture, NoMatch, Place, known_mlp

_TOKENS = 256
_NEAR_TIES = 4  # tokens for which the last bit decides between experts that are nearly alike
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "forward"


@dataclass(frozen=True)
class Found:
    """The rule of a router, and which of its vectors is the bias of its logits, and which corrects scores."""

    rule: cpu_router.Rule
    bias: int | None
    correction: int | None


@dataclass(frozen=True)
class Pieces:
    """A mixture whose rule is not known yet.

    Args:
        vectors: where the router's tensors of as many numbers as experts are.
        mlp_module: the module that ``mlp`` was found in.
    """

    block: Any
    experts: ExpertList
    weight: Place
    vectors: tuple[Place, ...]
    mlp: MLP | None
    mlp_module: Any
    mlp_gate: Any

    def completed(self, found: Found, dtype: torch.dtype) -> Mixture:
        bias, correction = (None if i is None else self.vectors[i] for i in (found.bias, found.correction))
        return Mixture(
            self.block, self.experts, self.weight, bias, correction, self.mlp, self.mlp_gate, found.rule, dtype
        )


def find_pieces(block: Any) -> Pieces:
    """What ``block`` consists of.

    Raises:
        NoMatch: it is no mixture whose experts run in one call, or has parts of unknown use.
    """
    experts = next((child for child in block.children() if type(child) is ExpertList), None)
    if experts is None or experts.passing or experts.grouped is None or experts.grouped.one_call is None:
        raise NoMatch("it has no experts that run in one call")
    mlps = [(mlp, child) for child in block.children() if child is not experts and (mlp := known_mlp(child))]
    gates = [child for child in block.children() if type(child) is nn.Linear and child.out_features == 1]
    apart = {id(each) for child in (experts, *(child for _, child in mlps), *gates) for each in child.modules()}
    places = [
        (module, name)
        for module in block.modules()
        if id(module) not in apart
        for name, tensor in (*module._parameters.items(), *module._buffers.items())
        if tensor is not None
    ]
    weights = [place for place in places if _at(place).dim() == 2 and min(_at(place).shape) > 1]
    vectors = [place for place in places if _at(place).numel() == experts.num_experts and place not in weights]
    one_each = len(weights) == 1 and len(mlps) <= 1 and len(gates) <= len(mlps) and len(vectors) <= 2
    floating = all(_at(place).is_floating_point() and _at(place).is_cpu for place in places)
    if not one_each or len(places) != 1 + len(vectors) or not floating:
        raise NoMatch("its mixture has parts of unknown use")
    mlp, module = mlps[0] if mlps else (None, None)
    return Pieces(block, experts, weights[0], tuple(vectors), mlp, module, gates[0] if gates else None)


def _at(place: Place) -> Any:
    module, name = place
    return module._parameters.get(name, module._buffers.get(name))


@torch.no_grad()
def find_rule(pieces: Pieces, dtype: torch.dtype) -> Found:
    """How the router chooses, from what the block gives its experts for random tokens, with a random router.

    Also shows that the block adds up what the experts and the MLP beside them give.

    Raises:
        NoMatch: no rule that is known.
    """
    generator = torch.Generator().manual_seed(0)
    experts, width = _at(pieces.weight).shape
    weight = (torch.randn(experts, width, generator=generator) * width**-0.5).to(_at(pieces.weight).dtype)
    vectors = [_random_vector(_at(place), generator) for place in pieces.vectors]
    x = (2 * torch.randn(1, _TOKENS, width, generator=generator)).to(dtype)
    index, counts = _watched(pieces, x, weight, vectors, generator)
    wanted = _spread(index, counts, experts)
    flat = [vector.view(-1) for vector in vectors]
    best, found = _TOKENS - _NEAR_TIES - 1, None
    for base in _trials(pieces, index.shape[1], experts):
        tried = [replace(base, rule=replace(base.rule, rounded=rounded)) for rounded in (True, False)]
        alike, _, trial = max(
            (_compared(pieces, each, x, weight, flat, wanted) for each in tried), key=itemgetter(0, 1)
        )
        if alike > best:  # a rule that differs in rare cases only is no better for that
            best, found = alike + _NEAR_TIES, trial
    if found is None:
        raise NoMatch("its router chooses by a rule that is not known")
    return found


def _compared(
    pieces: Pieces, trial: Found, x: Tensor, weight: Tensor, vectors: list[Tensor], wanted: Tensor
) -> tuple[int, float, Found]:
    """For how many tokens the experts are those that are wanted, how well it gives what they count, and with a scale.

    Args:
        wanted: [T, experts], what each counts.
    """
    bias, correction = (None if i is None else vectors[i] for i in (trial.bias, trial.correction))
    router = cpu_router.RouterParts(cpu_dense.Dense(weight, bias), trial.rule, correction)
    spread = _spread(*cpu_router.Router(router)(x), len(weight))
    alike = ((spread > 0) == (wanted > 0)).all(-1)
    ratios = wanted[alike].sum(-1) / spread[alike].sum(-1)
    measured = float(ratios.median()) if len(ratios) else 0.0
    scale = min((1.0, 1.0 / trial.rule.top_k, *_settings(pieces)), key=lambda each: abs(each - measured))
    error = (wanted - scale * spread)[alike].abs().sum() / wanted[alike].sum()
    exact = float(error) < (1e-4 if x.dtype is torch.float32 else 1e-2)
    return int(alike.sum()) if exact else 0, -float(error), replace(trial, rule=replace(trial.rule, scale=scale))


def _random_vector(like: Tensor, generator: torch.Generator) -> Tensor:
    """Small numbers, beside which scores count, and a large one, which is seen wherever it is added."""
    vector = torch.rand(like.shape, generator=generator) / like.numel()
    vector.view(-1)[0] = 0.5
    return vector.to(like.dtype)


def _watched(
    pieces: Pieces, x: Tensor, weight: Tensor, vectors: list[Tensor], generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """What a copy of the block with these tensors gives its experts: their numbers and what they count, [T, k]."""
    calls: list[tuple[Any, ...]] = []
    routed, beside = (torch.randn(x.shape[1:], generator=generator).to(x.dtype) for _ in range(2))

    def experts(hidden: Tensor, index: Tensor, counts: Tensor) -> Tensor:
        calls.append((hidden, index, counts))
        return routed.clone()

    def mlp(hidden: Tensor) -> Tensor:
        calls.append((hidden,))
        return beside.clone().view(hidden.shape)

    tensors = {id(_at(place)): value for place, value in zip((pieces.weight, *pieces.vectors), (weight, *vectors))}
    stubs: dict[int, nn.Module] = {id(pieces.experts): _Stub(experts), id(pieces.mlp_module): _Stub(mlp)}
    try:
        y = type(pieces.block).forward(_twin(pieces.block, tensors, stubs), x.clone())
    except NoMatch:
        raise
    except Exception as error:
        raise NoMatch(f"its mixture wants more than hidden states ({type(error).__name__})") from error
    y = y[0] if isinstance(y, tuple) else y
    flat, total = x[0], routed.float()
    if pieces.mlp is not None:
        gate = pieces.mlp_gate
        total = total + (1.0 if gate is None else gate(flat).float().sigmoid()) * beside.float()
    of_experts = [call for call in calls if len(call) == 3]
    if (
        len(of_experts) != 1
        or len(calls) != (1 if pieces.mlp is None else 2)
        or not all(torch.equal(hidden.view(-1, flat.shape[-1]), flat) for hidden, *_ in calls)
        or not torch.allclose(y.float().view(total.shape), total, rtol=2e-2, atol=2e-2)
    ):
        raise NoMatch("its mixture does more than to add up what its experts give")
    _, index, counts = of_experts[0]
    if index.dim() != 2 or counts.shape != index.shape or len(index) != len(flat):
        raise NoMatch("its router gives something else than experts and what they count")
    return index, counts


class _Stub(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.forward = function


def _twin(module: Any, tensors: dict[int, Tensor], stubs: dict[int, nn.Module]) -> Any:
    """A copy of ``module`` with other tensors and children, by the ``id`` of those."""
    if id(module) in stubs:
        return stubs[id(module)]
    if any(map(vars(module).get, _HOOKS)):
        raise NoMatch("modules of its mixture have hooks")
    twin = copy.copy(module)
    for kind in ("_parameters", "_buffers"):
        twin.__dict__[kind] = {name: tensors.get(id(each), each) for name, each in vars(module)[kind].items()}
    children = module._modules.items()
    twin.__dict__["_modules"] = {name: None if each is None else _twin(each, tensors, stubs) for name, each in children}
    return twin


def _trials(pieces: Pieces, top_k: int, experts: int) -> Iterator[Found]:
    """Rules to try, the plain ones first."""
    few: list[list[tuple[int | None, int | None]]] = [[(None, None)], [(0, None), (None, 0)], [(0, 1), (1, 0)]]
    uses = few[len(pieces.vectors)]  # as bias and as correction
    numbers = sorted({int(each) for each in _settings(pieces) if each.is_integer()})
    limits = [(1, 1, 1)] + [
        (groups, chosen, best)
        for groups, chosen, best in itertools.product(numbers, numbers, (1, 2))
        if 0 < chosen < groups < experts and experts % groups == 0 and best <= experts // groups
        if top_k <= chosen * (experts // groups)
    ]
    for (groups, chosen, best), (bias, correction) in itertools.product(limits, uses):
        for sigmoid, normalized in itertools.product((False, True), (True, False)):
            rule = cpu_router.Rule(top_k, sigmoid, False, groups, chosen, best, normalized)
            yield Found(rule, bias, correction)


def _settings(pieces: Pieces) -> list[float]:
    """Numbers that the block and its router keep."""
    inside = {id(module) for module in pieces.experts.modules()}
    settings = [vars(module) for module in pieces.block.modules() if id(module) not in inside]
    numbers = [float(each) for held in settings for each in held.values() if type(each) in (int, float)]
    return [each for each in numbers if math.isfinite(each)]


def _spread(index: Tensor, counts: Tensor, experts: int) -> Tensor:
    """[T, k] of each -> what each expert counts, [T, experts]."""
    return torch.zeros(len(index), experts).scatter_(-1, index.long(), counts.float())
