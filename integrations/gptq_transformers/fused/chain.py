"""What layers that run in one call are: found link by link, and then looked at as one, because between Python's calls
little of what it needs stays in the processor's caches.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator
from typing import Any

from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from gptq_backend.kernels import cpu_layers

from .calls import Beginning, Calls
from .ending import Ending
from .held import Entry, Held
from .watch import Watch, Watches

# Of layers that are not called: what would be heard, or run in their place.
_CALLED = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_compiled_call_impl")
# What calls a layer's forward. Any other ``__call__`` may be somebody's who wants to hear of it.
_BASES = nn.Module, GradientCheckpointingLayer
_CALLS: tuple[Any, ...] = tuple(base.__call__ for base in _BASES)


class Link:
    """What runs a layer, and the link of the layer that is called with its result, where that is known.

    Args:
        calls: those that ran last; they may be outdated.
        chain: the layers that ran with it last, which may have changed. It keeps them alive, also where the model has
            dropped them, until the next call.
        ending: the norm and the head that came after it, if it is the last.
    """

    def __init__(self) -> None:
        self.calls: Calls | None = None
        self.chain: Chain | None = None
        self._ending: weakref.ref[Ending] | None = None
        self._next: weakref.ref[Link] | None = None
        self._broken = False

    def learn(self, successor: Link) -> None:
        if not self._broken:
            self._next = weakref.ref(successor)

    def learn_ending(self, ending: Ending) -> None:
        if not self._broken:
            self._ending = weakref.ref(ending)

    def cut(self, for_good: bool = False) -> None:
        self._next, self._ending, self._broken = None, None, self._broken or for_good

    def forget(self) -> None:
        """Keep no tensors alive."""
        self.calls = self.chain = None

    @property
    def next(self) -> Link | None:
        return None if self._next is None else self._next()

    @property
    def ending(self) -> Ending | None:
        return None if self._ending is None else self._ending()


class Chain:
    """The layers that can run in one call with the first, and what that depends on.

    Args:
        first: the link of the first layer, whose calls are current.
    """

    def __init__(self, first: Link, beginning: Beginning) -> None:
        self.links: list[Link] = []
        self.calls: list[Calls] = []
        self.layers: list[cpu_layers.Layer] = []
        self._kind = beginning.kind
        self.joint: Joint | None = None
        indices: set[int] = set()
        follower: Link | None = first
        while follower is not None:
            calls = follower.calls
            layer = None if calls is None else calls.joined(beginning)
            if calls is None or layer is None or calls.index in indices:  # a circle, or two write to the same place
                break
            indices.add(calls.index)
            self.links.append(follower)
            self.calls.append(calls)
            self.layers.append(layer)
            follower = follower.next
        self.whole = follower is None
        self.mixtures = [i for i, calls in enumerate(self.calls) if calls.parts.mixture is not None]
        ends = [] if follower is None else [(vars(follower), "calls", follower.calls)]  # with others it may go on
        self.held = Held.joined([calls.held for calls in self.calls], [*self._entries(), *ends])

    def stands(self, beginning: Beginning) -> bool:
        """Whether it would be made as it is."""
        return self.fits(beginning) and not self.held.outdated()

    def fits(self, beginning: Beginning) -> bool:
        """Likewise, if nobody touched the layers."""
        return self._kind == beginning.kind

    def _entries(self) -> Iterator[Entry]:
        """What the modules and links say, which may change."""
        for link, calls in zip(self.links, self.calls):
            yield from ((vars(link), name, vars(link)[name]) for name in ("calls", "_next"))
            attention = vars(calls.parts.attention)
            yield from ((attention, name, attention.get(name)) for name in ("scaling", "config", "layer_idx"))


class Joint:
    """Tells in one look whether nobody touched any of the layers of a chain, which are then not called one by one.

    Args:
        layers: the modules that the links run, in their order.
        watches: of each.
    """

    def __init__(self, chain: Chain, layers: list[Any], watches: list[Watches]) -> None:
        self.layers = layers
        self._held, self._watch = chain.held, Watch.joined([each for both in watches for each in both.each()])
        states = [vars(layer) for layer in layers]
        forwards = tuple(state["forward"] for state in states)
        self._own = (
            (*states,),
            ("forward",) * len(states),
            forwards,
            tuple(state for state in states for _ in _CALLED),
            _CALLED * len(states),
        )
        self._kinds = {*_BASES, *map(type, layers)}
        self._experts = [chain.calls[i].parts.mixture.experts for i in chain.mixtures]  # type: ignore[union-attr]

    def untouched(self) -> bool:
        return (
            self._watch.untouched(self._own, self._held.places)
            and not self._held.moved()
            and all(kind.__call__ in _CALLS for kind in self._kinds)
            and all(experts.activates_as_known() for experts in self._experts)
        )
