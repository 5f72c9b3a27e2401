"""Takes the place of the ``forward`` of the norm and the head that follow the last layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from gptq_backend.kernels import operators_are_seen

from . import ahead
from .ending import Ending, find_ending


class NormForward:
    """Takes the place of the norm's ``forward``. It is the head that keeps the ending: another may take its place."""

    def __init__(self, ending: Ending) -> None:
        self._norm = ending.norm
        self._ending: Callable[[], Ending | None] = weakref.ref(ending)

    def __call__(self, *arguments: Any, **kwargs: Any) -> Any:
        alone = len(arguments) == 1 and not kwargs and not operators_are_seen() and not torch.is_grad_enabled()
        ending = self._ending() if alone else None
        if ending is not None and (y := ahead.resume_norm(ending, arguments[0])) is not None:
            return y
        y = type(self._norm).forward(self._norm, *arguments, **kwargs)
        if ending is not None:
            ahead.note_norm(ending, arguments[0], y)
        return y

    def __getstate__(self) -> tuple[Any, Ending | None]:
        """For copies and pickles."""
        return self._norm, self._ending()

    def __setstate__(self, state: tuple[Any, Ending | None]) -> None:
        self._norm, ending = state
        self._ending = _nothing if ending is None else weakref.ref(ending)


def _nothing() -> None:
    """In place of a reference to what is gone."""


class HeadForward:
    """Takes the place of the head's ``forward``."""

    def __init__(self, ending: Ending) -> None:
        self.ending = ending

    def __call__(self, *arguments: Any, **kwargs: Any) -> Any:
        head = self.ending.head
        if len(arguments) == 1 and not kwargs and not operators_are_seen() and not torch.is_grad_enabled():
            (x,) = arguments
            if (y := ahead.resume_head(self.ending, x)) is not None:
                return y
            if (product := self.ending.product_for(x)) is not None:
                return product(x)
        return type(head).forward(head, *arguments, **kwargs)


def join_ending(model: Any, layer: nn.Module) -> None:
    """Let the head run with the layers, of which ``layer`` is the last, if there is one.

    Raises:
        NoMatch: its parts, or those of the norm before it, are not known.
    """
    if (ending := find_ending(model, layer)) is not None:
        ending.norm.forward, ending.head.forward = NormForward(ending), HeadForward(ending)
