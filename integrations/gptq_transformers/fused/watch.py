"""Tells whether anything inside a decoder layer was hooked, replaced, patched or set since it was admitted."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import chain, repeat
from operator import is_
from types import FunctionType
from typing import Any

from torch import nn
from torch.nn.modules import module as nn_module

from gptq_backend.kernels import places

from .match import Parts

# Read in each call, or no concern of the calls.
_LIVE = frozenset(("scaling", "layer_idx", "training"))
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "forward")
_EPSILONS = ("variance_epsilon", "eps")

_Place = tuple[dict[str, Any], str, Any]  # a dictionary, a key in it, and what lay there


class Watch:
    """What a layer was when it was made.

    This is on the way of every call. So all that may change is looked up in one pass, without loops in Python.
    """

    def __init__(self, parts: Parts) -> None:
        modules = parts.modules()
        self._children: list[_Place] = [
            (parent._modules, name, child) for parent in modules for name, child in parent._modules.items()
        ]
        watched = [*self._children, *_settings(parts), *_functions(modules)]
        self._dicts, self._keys, self._values = zip(*watched)
        self._modules = modules
        self._types = [type(module) for module in self._modules]
        self._classes: list[Any] = list(dict.fromkeys(self._types))
        self._forwards = [each.forward for each in self._classes]
        served = {id(module) for module in (*parts.linears, *parts.norms, *parts.head_norms)}
        flags = [(module, name) for module in self._modules[1:] for name in _HOOKS]  # the layer's own hooks are called
        flags += [(module, "training") for module in self._modules if id(module) not in served]
        self._states = tuple(module.__dict__ for module, _ in flags)
        self._flags = tuple(name for _, name in flags)

    def untouched(self) -> bool:
        """Whether it computes what it did, and nobody listens."""
        return (
            (self._in_place() or self._behind_disabled_adapters())
            and self._same_code()
            and places.empty(self._states, self._flags)
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

    def _behind_disabled_adapters(self) -> bool:
        """Whether all that differs is that modules lie in adapters (PEFT) that are switched off."""
        return all(
            place.get(name) is value or (isinstance(value, nn.Module) and _passes_to(place.get(name), value))
            for place, name, value in zip(self._dicts, self._keys, self._values)
        )

    def _same_code(self) -> bool:
        return all(map(is_, map(getattr, self._classes, repeat("forward")), self._forwards)) and all(
            map(is_, map(type, self._modules), self._types)
        )

    def code(self) -> list[tuple[str, str]]:
        """Names of the code that the layer runs, which another process can compare."""
        functions = [value for value in self._values if isinstance(value, FunctionType)]
        return [(each.__module__, each.__qualname__) for each in chain(self._forwards, functions)]


def _passes_to(module: Any, inner: nn.Module) -> bool:
    """Whether a call of ``module`` is one of ``inner``: what is around it are adapters (PEFT) that are switched off."""
    while module is not inner:
        if not getattr(module, "disable_adapters", False) or any(map(vars(module).get, _HOOKS)):
            return False
        module = module._modules.get("base_layer", module._modules.get("original_module"))
    return True


def _settings(parts: Parts) -> Iterator[_Place]:
    """Plain attributes that the modules' code may read."""
    for module in parts.parents:
        state = module.__dict__
        for name in state.keys() - _LIVE:
            if not name.startswith("_"):
                yield state, name, state[name]
    for norm in (*parts.norms, *parts.head_norms):
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
