"""Runs the decoder layers behind one as well, in one call, and hands each its result when it is called.

Between two layers of a model usually nothing happens: the second is called with what the first returned, the same
mask, angles and cache. Where that was so once, the first layer's call computes what the second will be asked for. A
decoding step then takes one call for all layers. Between two of them Python would be slow, because the weights that
pass by evict it from the processor's caches.

Nothing of it is seen before a layer is called: keys and values lie behind those in use, and a result that nobody asks
for, or with other arguments, is dropped.
"""

from __future__ import annotations

import threading
import weakref
from operator import attrgetter, is_
from typing import Any

from torch import Tensor

from gptq_backend.kernels import cpu_layers

from .cache import Room, room_of
from .calls import Calls

_version = attrgetter("_version")
_GIVEN = "attention_mask", "position_embeddings", "past_key_values"


class Link:
    """What runs a layer, and the link of the layer that is called with its result, where that is known.

    Args:
        calls: those that ran last; they may be outdated.
    """

    def __init__(self) -> None:
        self.calls: Calls | None = None
        self._next: weakref.ref[Link] | None = None
        self._broken = False

    def learn(self, successor: Link) -> None:
        if not self._broken:
            self._next = weakref.ref(successor)

    def cut(self, for_good: bool = False) -> None:
        self._next, self._broken = None, self._broken or for_good

    @property
    def next(self) -> Link | None:
        return None if self._next is None else self._next()


class _Latest(threading.local):
    """What the latest layer of this thread returned. Held no longer than that result is."""

    output: weakref.ref[Tensor] | None = None
    link: Link | None = None
    given: tuple[Any, ...] = ()
    run: _Run | None = None
    index = 0

    def note(self, output: Tensor, link: Link, given: tuple[Any, ...], run: _Run | None = None, index: int = 0) -> None:
        slot = self.__dict__  # that of this thread, whichever the output is freed in
        slot.update(output=weakref.ref(output, lambda ref: _forget(slot, ref)), link=link, given=given)
        slot.update(run=run, index=index)

    def clear(self) -> None:
        self.__dict__.clear()


def _forget(slot: dict[str, Any], output: weakref.ref[Tensor]) -> None:
    if slot.get("output") is output:
        if slot["run"] is not None:  # nobody asked for the rest
            slot["link"].cut()
        slot.clear()


_latest = _Latest()


class _Run:
    """Layers that ran in one call."""

    def __init__(
        self, calls: list[Calls], held: list[tuple[Any, Room]], read: list[Tensor], results: cpu_layers.Results
    ) -> None:
        self.calls, self._held, self._results = calls, held, results
        self._views = [(layer.keys, layer.values) for layer, _ in held]
        counted = not any(map(Tensor.is_inference, (results.ys, *read)))  # what is written to those, nobody counts
        self._watched = [(*views, *read) if counted else () for views in self._views]
        self._versions = list(map(_versions, self._watched))
        self._length = held[0][0].keys.shape[2] + results.ys.shape[2]

    def unseen(self, index: int, x: Tensor) -> bool:
        """Whether ``x``, the cache, the mask and the angles are still what layer ``index`` was computed with."""
        layer, views = self._held[index][0], self._views[index]
        return (
            layer.keys is views[0]
            and layer.values is views[1]
            and _versions(self._watched[index]) == self._versions[index]
            and self._results.intact(index - 1, x)
        )

    def stands(self, index: int) -> bool:
        """Whether nobody touched the experts that layer ``index`` was computed with."""
        return self.calls[index].stands(self._results.chosen(index))

    def give(self, index: int, link: Link, given: tuple[Any, ...]) -> Tensor:
        layer, room = self._held[index]
        room.give(layer, self._length)
        y = self._results.ys[index].data  # for autograd it has nothing to do with what the other layers gave
        if index + 1 < len(self.calls):
            _latest.note(y, link, given, self, index + 1)
        else:
            _latest.note(y, link, given)
        return y


def _versions(tensors: tuple[Tensor, ...]) -> list[int]:
    """Numbers that grow whenever somebody writes into a tensor."""
    return list(map(_version, tensors))


def given_of(kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What must be the same objects for two layers."""
    return tuple(map(kwargs.get, _GIVEN))


def resume(own: Link, calls: Calls, x: Tensor, given: tuple[Any, ...]) -> Tensor | None:
    """What the layer gives, if it was computed already."""
    latest = _latest
    output, link, run, index = latest.output, latest.link, latest.run, latest.index
    if output is None or link is None:
        return None
    follows = output() is x and all(map(is_, latest.given, given))
    if run is None:
        if follows:
            link.learn(own)
        return None
    if follows and calls is run.calls[index]:
        unseen = run.unseen(index, x)
        if unseen and run.stands(index):
            return run.give(index, own, given)
        link.cut(for_good=not unseen)  # it would be learnt again, in vain
    else:
        link.cut()
    latest.clear()
    return None


def start(own: Link, calls: Calls, x: Tensor, given: tuple[Any, ...]) -> Tensor | None:
    """What the layer gives, and with it what those behind it will; None where it has to run by itself."""
    mask, _, cache = given
    first = None if cache is None or own.next is None else room_of(cache, calls.index, x.shape[1])
    if first is None:
        return None
    length = first[0].keys.shape[2]
    beginning = calls.begin(x, given, length)
    if beginning is None:
        return None
    chain: list[Calls] = []
    layers: list[cpu_layers.Layer] = []
    held: list[tuple[Any, Room]] = []
    written: set[int] = set()
    follower: Link | None = own
    while follower is not None and (each := follower.calls) is not None:
        found, layer = room_of(cache, each.index, x.shape[1]), each.joined(beginning)
        if found is None or layer is None or found[0].keys.shape[2] != length or not found[1].fits(layer, x):
            break
        if id(found[0]) in written:  # both would write to the same place; or a circle of layers
            break
        written.add(id(found[0]))
        chain.append(each)
        layers.append(layer)
        held.append(found)
        follower = follower.next
    if len(chain) < 2:
        return None
    rooms = [room.place for _, room in held]
    results = cpu_layers.run_layers(layers, rooms, [length] * len(chain), x, beginning.angles, mask)
    read = [each for each in (mask, *(beginning.angles or ())) if each is not None]
    run = _Run(chain, held, read, results)
    return run.give(0, own, given) if run.stands(0) else None


def note(own: Link, y: Tensor, given: tuple[Any, ...]) -> None:
    """Remember that the layer ran by itself, to see which one is next."""
    _latest.note(y, own, given)
