"""Which methods of peft are replaced, and by what: everything that touches peft's own classes is in this file."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

from .linear_view import seen_as_linear
from .merging import merge_onto_dense, refuse_merging_in_place
from .quantized import base_of
from .trained_copies import put_dense_copy

_adapted: set[type] = set()

# (the original, its self, *its arguments, **its arguments) -> its result
_Around = Callable[..., Any]


def adapt_tuners() -> None:
    """See :func:`gptq_peft.register`; peft is imported."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if BaseTuner in _adapted:
        return
    replaced: list[tuple[type, str, Any]] = [
        (BaseTuner, "__init__", _wrapped(BaseTuner.__init__, _new_tuner)),
        (BaseTuner, "inject_adapter", _wrapped(BaseTuner.inject_adapter, _inject)),
        (BaseTuner, "merge_adapter", _wrapped(BaseTuner.merge_adapter, _merge_adapter)),
        (BaseTunerLayer, "weight", property(_wrapped(BaseTunerLayer.weight.fget, _weight))),
        (ModulesToSaveWrapper, "update", _wrapped(ModulesToSaveWrapper.update, put_dense_copy)),
    ]
    unload = "_unload_and_optionally_merge"
    owners = [tuner for tuner in _family(BaseTuner) if unload in vars(tuner)]  # peft < 0.18: each has its own
    replaced += [(tuner, unload, _wrapped(vars(tuner)[unload], merge_onto_dense)) for tuner in owners]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    _adapted.add(BaseTuner)


def _wrapped(original: Any, around: _Around) -> Any:
    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    return method


def _new_tuner(original: Any, self: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    with seen_as_linear(model):
        original(self, model, *args, **kwargs)


def _inject(original: Any, self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    with seen_as_linear(model):
        return original(self, model, *args, **kwargs)


def _merge_adapter(original: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    refuse_merging_in_place(self)
    return original(self, *args, **kwargs)


def _weight(original: Any, self: Any) -> Any:
    """peft gives the packed words, to whose dtype T5 would cast its activations."""
    layer = base_of(self)
    return original(self) if layer is None else layer.weight


def _family(base: Any) -> Iterator[Any]:
    yield base
    for child in base.__subclasses__():
        yield from _family(child)
