"""Every expert of a mixture called with all tokens, so that those get calibrated that a router rarely chooses."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn


def call_of_all(module: nn.Module) -> Callable[..., Any] | None:
    """What calls each expert of ``module`` with all tokens, given the arguments of its ``forward``; None if it is no
    mixture. That is a module with a ``call_all`` of its own, or one whose ``experts`` are a plain list.
    """
    if (own := getattr(module, "call_all", None)) is not None:
        return own
    experts = getattr(module, "experts", None)
    if type(experts) is not nn.ModuleList:
        return None

    def call(hidden_states: Any, *_: Any, **__: Any) -> None:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        for expert in experts:
            expert(x)

    return call
