"""What transformers' own ``GPTQConfig`` needs, so that it keeps what users pass to it. Standard library only."""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any

_ODD_BITS = (5, 6, 7)  # which transformers' own class refuses
LOADING = ("backend", "fuse", "quantize_head")  # how to load, which no checkpoint says


def relax_config(config_class: Any) -> None:
    """Let ``config_class`` keep arguments that it does not know, and take module lists without optimum, and codes of 5
    to 7 bits. Idempotent.

    transformers' ``GPTQConfig`` drops ``lm_head`` or ``dynamic`` silently, asks for the version of optimum as soon as
    ``modules_in_block_to_quantize`` is given, and forgets how to load what has a config of its own.
    """
    original, loading = config_class.__init__, config_class.get_loading_attributes
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        passed = dict(kwargs)
        bits = args[0] if args else kwargs.get("bits")
        if bits in _ODD_BITS:
            args, passed = (8, *args[1:]), {key: value for key, value in passed.items() if key != "bits"}
        if is_missing("optimum"):
            passed.pop("modules_in_block_to_quantize", None)
        original(self, *args, **passed)
        self.bits = bits
        for key, value in kwargs.items():
            if key not in passed or not hasattr(self, key):
                setattr(self, key, value)

    @functools.wraps(loading)
    def get_loading_attributes(self: Any) -> dict[str, Any]:
        chosen = {key: value for key in LOADING if (value := getattr(self, key, None)) is not None}
        return {**loading(self), **chosen}

    config_class.__init__, config_class.get_loading_attributes = __init__, get_loading_attributes


def is_missing(name: str) -> bool:
    """Whether the package ``name`` cannot be imported; it is not imported to find out."""
    if name in sys.modules:
        return sys.modules[name] is None
    return importlib.util.find_spec(name) is None
