"""Which methods of peft, and functions around it, are replaced. Nothing else in this package changes what is theirs."""

from __future__ import annotations

import functools
import importlib
import sys
from collections.abc import Iterator
from typing import Any

_adapted: set[type] = set()
# Files of this package, and for each the package without which there is no layer of ours for it to serve.
_NEEDED = {"replacements": "gptq_backend", "experts": "gptq_transformers"}
# What knows of fused experts: nothing in transformers 4, nor in peft before 0.19.
_CONVERSIONS = {
    "peft.utils.transformers_weight_conversion": {
        "convert_peft_config_for_transformers": "keep_targets",
        "get_model_conversion_mapping": "keep_names",
    },
    "transformers.integrations.peft": {"get_model_conversion_mapping": "keep_names"},
}


def adapt_tuners() -> None:
    """See :func:`gptq_peft.register`; peft is imported."""
    from peft.peft_model import PeftModel
    from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
    from peft.utils.other import ModulesToSaveWrapper

    if BaseTuner in _adapted:
        return
    replaced: list[tuple[Any, str, Any]] = [
        (BaseTuner, "__init__", _replaced(BaseTuner.__init__, "put_on")),
        (BaseTuner, "inject_adapter", _replaced(BaseTuner.inject_adapter, "put_on")),
        (BaseTuner, "merge_adapter", _replaced(BaseTuner.merge_adapter, "merge_in_place")),
        (PeftModel, "_setup_prompt_encoder", _replaced(PeftModel._setup_prompt_encoder, "set_up_prompts")),
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
    replaced += _conversions()
    for owner, name, value in replaced:
        setattr(owner, name, value)
    _adapted.add(BaseTuner)


def _conversions() -> Iterator[tuple[Any, str, Any]]:
    for module, names in _CONVERSIONS.items():
        try:
            owner = importlib.import_module(module)
        except ImportError:
            continue
        for name, ours in names.items():
            if hasattr(owner, name):
                yield owner, name, _replaced(getattr(owner, name), ours, "experts")


def _replaced(original: Any, name: str, file: str = "replacements") -> Any:
    """A method or function that hands itself and its arguments to the function ``name`` in a file of this package.

    That file imports the core, whose import may be going on when peft is adapted.
    """

    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        if _NEEDED[file] not in sys.modules:
            return original(*args, **kwargs)
        ours = importlib.import_module(f"{__package__}.{file}")
        return getattr(ours, name)(original, *args, **kwargs)

    return method


def _family(base: Any) -> Iterator[Any]:
    yield base
    for child in base.__subclasses__():
        yield from _family(child)
