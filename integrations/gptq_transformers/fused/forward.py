"""Takes the place of a decoder layer's ``forward``, and steps aside for whatever it does not serve."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor

from gptq_backend.kernels import operators_are_seen

from . import ahead, chain
from .calls import DTYPES, Calls
from .match import Parts
from .watch import Watches

# A layer that is called with more, or asked for more, serves as it always did.
_MORE = "output_attentions", "output_hidden_states", "output_router_logits"
_KNOWN = frozenset(
    ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings", "cache_position", *_MORE)
)


class FusedForward:
    """Takes the place of a decoder layer's ``forward``; hands to it whatever it cannot serve.

    Args:
        pairs: which channels rotary angles turn together, of ``cpu_attention.PAIRS``; None for a layer without
            positions.
    """

    def __init__(self, parts: Parts, pairs: str | None) -> None:
        self.layer, self.pairs = parts.layer, pairs
        self.parts: Parts | None = parts
        self.link = chain.Link()
        self.watch: Watches | None = Watches(parts)
        self._code = self.watch.code()

    def __call__(self, hidden_states: Tensor, *arguments: Any, **kwargs: Any) -> Any:
        if not arguments and (y := ahead.proceed(self.link, self.watch, hidden_states, kwargs)) is not None:
            return y
        calls = None if arguments else self.serves(hidden_states, kwargs)
        if calls is None:
            return type(self.layer).forward(self.layer, hidden_states, *arguments, **kwargs)
        given = ahead.given_of(kwargs)
        y = ahead.resume(self.link, calls, hidden_states, given)
        if y is None:
            y = ahead.start(self.link, calls, hidden_states, kwargs)
        if y is None:
            y = calls.run(hidden_states, **kwargs)
            ahead.note(self.link, y, given)
        return y

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.layer).forward.__get__(self.layer))

    def serves(self, x: Tensor, kwargs: dict[str, Any]) -> Calls | None:
        """The calls to run, if nobody expects more of the layer's modules than their result."""
        if not self.may_serve(x, kwargs):
            return None
        calls = self._current_calls()
        return calls if calls is not None and calls.fit(x, kwargs) else None

    def may_serve(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Likewise, but for what is true of one layer alone."""
        if operators_are_seen() or torch.is_grad_enabled():
            return False
        if type(x) is not Tensor or x.dtype not in DTYPES or not x.is_cpu or torch.is_autocast_enabled("cpu"):
            self.link.forget()  # it would keep what may have moved to another device
            return False
        return _KNOWN.issuperset(kwargs) and not any(map(kwargs.get, _MORE))

    def _current_calls(self) -> Calls | None:
        """Calls that read the modules' present tensors; None where a module was touched, or has others."""
        parts, watch, calls = self.parts, self.watch, self.link.calls
        if parts is None:
            return None
        if watch is None:  # of a copy
            watch = self.watch = Watches(parts)
            if watch.code() != self._code:
                self._retire()
                return None
        served = watch.served()
        if served is None:
            if watch.layer.replaced():
                self._retire()
            return None
        self.parts = watch.parts
        if calls is None or calls.parts is not served or calls.outdated():
            try:
                self.link.calls = calls = Calls(served, self.pairs)
            except Exception:  # the layer's own code serves, or says better what is wrong
                self.link.calls = calls = None
        return calls

    def _retire(self) -> None:
        """Leave the layer to its own code for good, and keep nothing alive."""
        self.parts = self.watch = None
        self.link.forget()
        if vars(self.layer).get("forward") is self:
            vars(self.layer).pop("forward", None)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which look anew at what they hold."""
        same = self.watch is None or self.watch.unchanged()
        fresh = {"watch": None, "link": chain.Link()}
        return vars(self) | fresh | {"parts": self.parts if same else None}
