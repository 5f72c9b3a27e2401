"""What transformers' own ``GPTQConfig`` needs, so that it keeps what users pass to it. Standard library only."""

from __future__ import annotations

import functools
import importlib.util
import sys
from typing import Any


def relax_config(config_class: Any) -> None:
    """Let ``config_class`` keep arguments that it does not know, and take module lists without optimum. Idempotent.

    transformers' ``GPTQConfig`` drops ``lm_head`` or ``dynamic`` silently, and asks for the version of optimum as soon
    as ``modules_in_block_to_quantize`` is given.
    """
    original = config_class.__init__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        passed = dict(kwargs)
        if is_missing("optimum"):
            passed.pop("modules_in_block_to_quantize", None)
        original(self, *args, **passed)
        for key, value in kwargs.items():
            if key not in passed or not hasattr(self, key):
                setattr(self, key, value)

    config_class.__init__ = __init__


def is_missing(name: str) -> bool:
    """Whether the package ``name`` cannot be imported; it is not imported to find out."""
    if name in sys.modules:
        return sys.modules[name] is None
    return importlib.util.find_spec(name) is None
