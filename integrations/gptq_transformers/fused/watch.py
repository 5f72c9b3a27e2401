"""Tells whether anything in a decoder layer or its mixture was hooked, replaced, patched or set since its admission."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain, repeat
from operator import is_
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules import module as nn_module

from gptq_backend.kernels import places

from ..experts.expert_list import ExpertList
from .match import Mixture, Parts

# Read in each call, or no concern of the calls.
_LIVE = frozenset(("scaling", "layer_idx", "training"))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "forward")
_EPSILONS = ("variance_epsilon", "eps")

_Place = tuple[dict[str, Any], str, Any]  # a dictionary, a key in it, and what lay there


class Watch:
    """What some modules were when it was made.

    This is on the way of every call. So all that may change is looked up in one pass, without loops in Python.

    Args:
        heard: the modules whose hooks would go unheard.
        parents: those whose settings count.
        served: those that do not care whether they are in training.
        norms: whose epsilons count.
    """

    def __init__(
        self,
        modules: list[nn.Module],
        heard: list[nn.Module],
        parents: Sequence[nn.Module],
        served: Sequence[nn.Module],
        norms: Sequence[Any] = (),
    ) -> None:
        self._children: list[_Place] = [
            (parent._modules, name, child)
            for parent in modules
            if not isinstance(parent, ExpertList)  # experts are looked at when they are chosen
            for name, child in parent._modules.items()
        ]
        watched = [*self._children, *_settings(parents, norms), *_functions(modules)]
        self._dicts, self._keys, self._values = zip(*watched)
        self._modules = modules
        self._types = [type(module) for module in self._modules]
        self._classes: list[Any] = list(dict.fromkeys(self._types))
        self._forwards = [each.forward for each in self._classes]
        careless = set(map(id, served))
        flags = [(module, name) for module in heard for name in _HOOKS]
        flags += [(module, "training") for module in self._modules if id(module) not in careless]
        self._states = tuple(module.__dict__ for module, _ in flags)
        self._flags = tuple(name for _, name in flags)
        self.places = self._dicts, self._keys, self._values, self._states, self._flags

    @classmethod
    def of_layer(cls, parts: Parts) -> Watch:
        """All but what is inside a mixture, or an MLP that is called as it is. The layer's own hooks are called."""
        modules, norms = parts.modules(), (*parts.norms, *parts.head_norms)
        return cls(modules, modules[1:], parts.parents, (*parts.linears, *filter(None, norms)), norms)

    @classmethod
    def of_mixture(cls, mixture: Mixture) -> Watch:
        """All but what is inside the experts."""
        modules, served = mixture.modules(), (*mixture.linears, mixture.experts)
        return cls(modules, modules, [module for module in modules if module not in served], served)

    @classmethod
    def joined(cls, watches: list[Watch]) -> Watch:
        """What all of them watch, each place once."""
        whole = cls([], [], [], [])
        dicts, keys, values, states, flags = (
            tuple(chain.from_iterable(parts)) for parts in zip(*(each.places for each in watches))
        )
        once = {(id(place), key, id(value)): (place, key, value) for place, key, value in zip(dicts, keys, values)}
        whole._dicts, whole._keys, whole._values = zip(*once.values())
        whole._states, whole._flags = states, flags
        whole.places = whole._dicts, whole._keys, whole._values, whole._states, whole._flags
        whole._modules = [module for each in watches for module in each._modules]
        whole._types = [kind for each in watches for kind in each._types]
        forwards = {kind: forward for each in watches for kind, forward in zip(each._classes, each._forwards)}
        whole._classes, whole._forwards = list(forwards), list(forwards.values())
        return whole

    def untouched(self, *more: tuple[tuple[Any, ...], ...]) -> bool:
        """Whether it computes what it did, and nobody listens; and whether ``more`` places are what they were."""
        return (
            (places.untouched([self.places, *more]) or self._heard_by_nobody_behind_disabled_adapters(*more))
            and self._same_code()
            and not nn_module._global_forward_hooks
            and not nn_module._global_forward_pre_hooks
        )

    def unchanged(self) -> bool:
        """Whether it is what it was."""
        return self._in_place() and self._same_code()

    def replaced(self) -> bool:
        """Whether a module has gone; then nothing here should keep it alive. Inside another, an adapter, it has not."""
        for place, name, child in self._children:
            found = place.get(name)
            if found is not child and (found is None or all(each is not child for each in found.modules())):
                return True
        return False

    def _in_place(self) -> bool:
        return places.unchanged(self._dicts, self._keys, self._values)

    def _heard_by_nobody_behind_disabled_adapters(self, *more: tuple[tuple[Any, ...], ...]) -> bool:
        """Whether all that differs is that modules lie in adapters (PEFT) that are switched off."""
        return places.untouched([((), (), (), self._states, self._flags), *more]) and all(
            place.get(name) is value or (isinstance(value, nn.Module) and _passes_to(place.get(name), value))
            for place, name, value in zip(self._dicts, self._keys, self._values)
        )

    def _same_code(self) -> bool:
        return all(map(is_, map(getattr, self._classes, repeat("forward")), self._forwards)) and all(
            map(is_, map(type, self._modules), self._types)
        )

    def code(self) -> list[tuple[str, str]]:
        """See :class:`Watches`."""
        functions = [value for value in self._values if isinstance(value, FunctionType)]
        return [(each.__module__, each.__qualname__) for each in chain(self._forwards, functions)]


class Watches:
    """That of a layer, and that of its mixture if it has one."""

    def __init__(self, parts: Parts) -> None:
        self.parts, self._plain = parts, replace(parts, mixture=None)
        self.layer = Watch.of_layer(parts)
        self._mixture = None if parts.mixture is None else Watch.of_mixture(parts.mixture)

    def served(self, *more: tuple[tuple[Any, ...], ...]) -> Parts | None:
        """What the calls can serve: all parts; those but the mixture, where that was touched; or None, also where
        ``more`` places are not what they were.
        """
        if not self.layer.untouched(*more):
            return None
        mixture = self.parts.mixture
        if mixture is None or self._mixture is None:
            return self.parts
        if self._mixture.untouched() and mixture.experts.activates_as_known():
            return self.parts
        if self._mixture.replaced():
            self.parts, self._mixture = self._plain, None
        return self._plain

    def each(self) -> list[Watch]:
        return [self.layer] if self._mixture is None else [self.layer, self._mixture]

    def unchanged(self) -> bool:
        """Whether all is what it was."""
        return self.layer.unchanged() and (self._mixture is None or self._mixture.unchanged())

    def code(self) -> list[tuple[str, str]]:
        """Names of the code that runs, which another process can compare."""
        return self.layer.code() + ([] if self._mixture is None else self._mixture.code())


def _passes_to(module: Any, inner: nn.Module) -> bool:
    """Whether a call of ``module`` is one of ``inner``: what is around it are adapters (PEFT) that are switched off."""
    while module is not inner:
        if not getattr(module, "disable_adapters", False) or any(map(vars(module).get, _HOOKS)):
            return False
        module = module._modules.get("base_layer", module._modules.get("original_module"))
    return True


def _settings(parents: Sequence[nn.Module], norms: Sequence[Any]) -> Iterator[_Place]:
    """Plain attributes that the modules' code may read."""
    for module in parents:
        state = module.__dict__
        for name in state.keys() - _LIVE:
            if not name.startswith("_"):
                yield state, name, state[name]
    for norm in norms:
        if norm is not None:
            yield from ((norm.__dict__, name, norm.__dict__.get(name)) for name in _EPSILONS)


def _functions(modules: list[nn.Module]) -> Iterator[_Place]:
    """Functions that the classes' code calls by name, such as the one that applies rotary angles."""
    classes: list[Any] = list(dict.fromkeys(map(type, modules)))
    for each in classes:
        function = inspect.unwrap(each.forward)
        scope = getattr(function, "__globals__", {})
        for name in getattr(getattr(function, "__code__", None), "co_names", ()):
            if isinstance(scope.get(name), FunctionType):
                yield scope, name, scope[name]
    scope = vars(nn.functional)
    yield scope, "scaled_dot_product_attention", scope["scaled_dot_product_attention"]
