"""GPTQ in peft: importing this package, before or after peft, lets peft's adapters train on quantized layers."""

from __future__ import annotations

import sys

from gptq_autoload import watch_peft
from gptq_autoload.watch import is_initializing

__all__ = ["register"]


def register() -> None:
    """Adapt peft: now if it is imported, else when it is. Idempotent; imports no peft by itself.

    Raises:
        ImportError, AttributeError: this version of peft has other names; nothing was changed.
    """
    peft = sys.modules.get("peft")
    if peft is None or is_initializing(peft):
        watch_peft()
        return
    from .tuners import adapt_tuners

    adapt_tuners()


register()
