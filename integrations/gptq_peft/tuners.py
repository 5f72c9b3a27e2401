"""Which methods of peft are replaced. Nothing else in this package changes what is peft's."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from typing import Any

_adapted: set[type] = set()


def adapt_tuners() -> None:
    """See :func:`gptq_peft.register`; peft is imported."""
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if BaseTuner in _adapted:
        return
    replaced: list[tuple[type, str, Any]] = [
        (BaseTuner, "__init__", _replaced(BaseTuner.__init__, "put_on")),
        (BaseTuner, "inject_adapter", _replaced(BaseTuner.inject_adapter, "put_on")),
        (BaseTuner, "merge_adapter", _replaced(BaseTuner.merge_adapter, "merge_in_place")),
        (BaseTunerLayer, "weight", property(_replaced(BaseTunerLayer.weight.fget, "weight_of"))),
    ]
    copies = {"update": "put_trained_copy", "enable_adapters": "switch_trained_copy"}
    replaced += [
        (ModulesToSaveWrapper, name, _replaced(getattr(ModulesToSaveWrapper, name), ours))
        for name, ours in copies.items()
    ]
    unload = "_unload_and_optionally_merge"
    owners = [tuner for tuner in _family(BaseTuner) if unload in vars(tuner)]  # peft < 0.18: each has its own
    replaced += [(tuner, unload, _replaced(vars(tuner)[unload], "unload")) for tuner in owners]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    _adapted.add(BaseTuner)


def _replaced(original: Any, name: str) -> Any:
    """A method that hands itself and its arguments to the function ``name`` of ``replacements.py``.

    That file imports the core, whose import may be going on when peft is adapted. Without it there is no layer of ours.
    """

    @functools.wraps(original)
    def method(self: Any, *args: Any, **kwargs: Any) -> Any:
        if "gptq_backend" not in sys.modules:
            return original(self, *args, **kwargs)
        from . import replacements

        return getattr(replacements, name)(original, self, *args, **kwargs)

    return method


def _family(base: Any) -> Iterator[Any]:
    yield base
    for child in base.__subclasses__():
        yield from _family(child)
