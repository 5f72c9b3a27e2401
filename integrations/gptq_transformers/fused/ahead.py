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

import torch
from torch import Tensor

from gptq_backend.kernels import cpu_layers, operators_are_seen, places

from .cache import Room, room_of, rooms_of
from .calls import Calls
from .chain import Chain, Link
from .ending import Ending
from .watch import Watches

_version = attrgetter("_version")
_GIVEN = "attention_mask", "position_embeddings", "past_key_values"


class _Latest(threading.local):
    """What the latest layer of this thread returned. Held no longer than that result is, and keeps no weights alive
    once nothing but the head can follow.
    """

    output: weakref.ref[Tensor] | None = None
    link: weakref.ref[Link] | None = None
    given: tuple[Any, ...] = ()
    run: Computed | None = None
    index = 0

    def note(
        self, output: Tensor, link: Link, given: tuple[Any, ...], run: Computed | None = None, index: int = 0
    ) -> None:
        slot = self.__dict__  # that of this thread, whichever the output is freed in
        slot.update(output=weakref.ref(output, lambda ref: _forget(slot, ref)), given=given)
        slot.update(link=weakref.ref(link), run=run, index=index)

    def clear(self) -> None:
        self.__dict__.clear()

    def behind(self) -> Link | None:
        """The link of that layer, if the layer is still there."""
        return None if self.link is None else self.link()


def _forget(slot: dict[str, Any], output: weakref.ref[Tensor]) -> None:
    if slot.get("output") is output:
        if slot["run"] is not None and (link := slot["link"]()) is not None:  # nobody asked for the rest
            link.cut()
        slot.clear()


_latest = _Latest()


class Computed:
    """What layers gave that ran in one call.

    Args:
        calls: of each.
        ending: the norm and head that were computed as well, or None.
    """

    def __init__(self, calls: list[Calls], results: cpu_layers.Results, ending: Ending | None) -> None:
        self.calls, self.ending, self._results = calls, ending, results

    def stands(self, index: int) -> bool:
        """Whether nobody touched the experts that layer ``index`` was computed with."""
        return self.calls[index].stands(self._results.chosen(index))

    def give_last(self, link: Link) -> Tensor:
        """What the last layer gives, which ``link`` runs."""
        y = self._results.y(len(self.calls) - 1)
        _latest.note(y, link, (), None if self.ending is None else self, len(self.calls))
        return y

    def give_normed(self, link: Link) -> Tensor:
        y = self._results.y(len(self.calls))
        assert self.ending is not None
        _latest.note(y, link, (weakref.ref(self.ending),), self, len(self.calls) + 1)
        # The head needs nothing but the results, and what the norm gave may be kept for longer than the model is.
        vars(self).update(dict.fromkeys(vars(self), ()) | {"_results": self._results})
        return y

    def logits_of(self, x: Tensor) -> Tensor | None:
        """What the head gives, if ``x`` is still what the norm gave."""
        return self._results.logits if self._results.intact(-1, x) else None

    def intact(self, y: Tensor) -> bool:
        """Whether ``y`` is the result of the last layer, as it was."""
        return self._results.intact(len(self.calls) - 1, y)


class _Run(Computed):
    """Likewise, of layers that are called one by one.

    Args:
        held: of each, its layer of the cache, and the room that it has there.
        kwargs: what the first was called with.
        angles: those that the layers turned by.
        length: positions that the cache holds with those of this step.
    """

    def __init__(
        self,
        chain: Chain,
        held: list[tuple[Any, Room]],
        kwargs: dict[str, Any],
        angles: Any,
        length: int,
        results: cpu_layers.Results,
        ending: Ending | None,
    ) -> None:
        super().__init__(chain.calls[: len(held)], results, ending)
        self.links, self.kwargs = chain.links[: len(held)], kwargs
        self._held, self._given = held, given_of(kwargs)
        self._views = [(layer.keys, layer.values) for layer, _ in held]
        read = tuple(each for each in (self._given[0], *(angles or ())) if each is not None)
        counted = not any(map(Tensor.is_inference, (results.ys, *read)))  # what is written to those, nobody counts
        self._watched = [views if counted else () for views in (read, *self._views)]
        self._versions = list(map(_versions, self._watched))
        self._grown = [room.views_of(length) for _, room in held]

    def unseen(self, index: int, x: Tensor) -> bool:
        """Whether ``x``, the cache, the mask and the angles are still what layer ``index`` was computed with."""
        layer, views = self._held[index][0], self._views[index]
        return (
            layer.keys is views[0]
            and layer.values is views[1]
            and all(_versions(self._watched[i]) == self._versions[i] for i in (0, index + 1))
            and self._results.intact(index - 1, x)
        )

    def give(self, index: int) -> Tensor:
        """What layer ``index`` gives; its cache then holds the keys and values."""
        layer, room = self._held[index]
        room.give(layer, self._grown[index])
        y = self._results.y(index)
        more = index + 1 < len(self.calls) or self.ending is not None
        _latest.note(y, self.links[index], self._given, self if more else None, index + 1)
        return y


def _versions(tensors: tuple[Tensor, ...]) -> list[int]:
    """Numbers that grow whenever somebody writes into a tensor."""
    return list(map(_version, tensors))


def given_of(kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """What must be the same objects for two layers."""
    return tuple(map(kwargs.get, _GIVEN))


def proceed(own: Link, watches: Watches | None, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """What the layer gives, if it was computed already and is called as the first one of the step was.

    That is the usual case, for which little has to be looked at again. Whether anything else is so, others find out.
    """
    latest = _latest
    run, output, index = latest.run, latest.output, latest.index
    if not isinstance(run, _Run) or output is None or output() is not x:
        return None
    if index >= len(run.calls) or run.links[index] is not own:
        return None
    if not places.same(kwargs, run.kwargs) or torch.is_grad_enabled() or torch.is_autocast_enabled("cpu"):
        return None
    calls = run.calls[index]
    if operators_are_seen() or watches is None or watches.served(calls.held.places) is not calls.parts:
        return None
    return run.give(index) if run.unseen(index, x) and run.stands(index) else None


def resume(own: Link, calls: Calls, x: Tensor, given: tuple[Any, ...]) -> Tensor | None:
    """What the layer gives, if it was computed already."""
    latest = _latest
    output, link, run, index = latest.output, latest.behind(), latest.run, latest.index
    if output is None or link is None:
        return None
    follows = output() is x and all(map(is_, latest.given, given))
    if run is None:
        if follows:
            link.learn(own)
        return None
    if isinstance(run, _Run) and follows and index < len(run.calls) and calls is run.calls[index]:
        unseen = run.unseen(index, x)
        if unseen and run.stands(index):
            return run.give(index)
        link.cut(for_good=not unseen)  # it would be learnt again, in vain
    else:
        link.cut()
    latest.clear()
    return None


def start(own: Link, calls: Calls, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """What the layer gives, and with it what those behind it will; None where it has to run by itself."""
    mask, _, cache = given = given_of(kwargs)
    first = None if cache is None or own.next is None else room_of(cache, calls.index, x.shape[1])
    if first is None:
        own.chain = None  # of a prompt it is no use, and the model may have dropped layers since
        return None
    length = first[0].keys.shape[2]
    beginning = calls.begin(x, given, length)
    if beginning is None:
        return None
    chain = own.chain
    if chain is None or not chain.stands(beginning):
        chain = own.chain = Chain(own, beginning)
    held = rooms_of(cache, [each.index for each in chain.calls], x.shape[1], length)
    held = held[: next((i for i, (_, room) in enumerate(held) if not room.fits(chain.layers[i], x)), len(held))]
    count = len(held)
    if count < 2:
        return None
    ending = chain.links[-1].ending if chain.whole and count == len(chain.links) else None
    call = None if ending is None else ending.call_for(x)
    rooms = [room.place for _, room in held]
    results = cpu_layers.run_layers(chain.layers[:count], rooms, [length] * count, x, beginning.angles, mask, call)
    run = _Run(chain, held, kwargs, beginning.angles, length + x.shape[1], results, None if call is None else ending)
    return run.give(0) if run.stands(0) else None


def drop_rest() -> None:
    """Forget what nobody asked for before the next step, and compute it no more."""
    if _latest.run is not None and (link := _latest.behind()) is not None:
        link.cut()
        _latest.clear()


def note(own: Link, y: Tensor, given: tuple[Any, ...]) -> None:
    """Remember that the layer ran by itself, to see which one is next."""
    _latest.note(y, own, given)


def resume_norm(ending: Ending, x: Any) -> Tensor | None:
    """What the norm behind the last layer gives, if it was computed already."""
    latest = _latest
    output, link, run = latest.output, latest.behind(), latest.run
    y = None if output is None else output()
    if run is None or link is None or y is None or y is not x:
        return None
    follows = run.ending is ending and latest.index == len(run.calls)
    if follows and run.intact(y):
        return run.give_normed(link)
    link.cut(for_good=follows)  # it would be learnt again, in vain
    latest.clear()
    return None


def note_norm(ending: Ending, x: Any, y: Any) -> None:
    """Remember that the norm ran by itself, to see whether the head is next."""
    latest = _latest
    output, link = latest.output, latest.behind()
    if output is not None and link is not None and x is not None and output() is x and latest.run is None:
        latest.note(y, link, (weakref.ref(ending),))


def resume_head(ending: Ending, x: Any) -> Tensor | None:
    """What the head gives for what the norm gave, or a view of all of it, if it was computed already."""
    latest = _latest
    output, link, run, given = latest.output, latest.behind(), latest.run, latest.given
    normed = None if output is None else output()
    if normed is None or link is None or len(given) != 1 or given[0]() is not ending:
        return None
    latest.clear()
    if type(x) is not Tensor or not _is_all_of(x, normed):
        if run is not None:
            link.cut()
    elif run is None:
        link.learn_ending(ending)
    elif (logits := run.logits_of(x)) is not None:
        return logits
    else:
        link.cut(for_good=True)
    return None


def _is_all_of(x: Tensor, y: Tensor) -> bool:
    """Whether ``x`` is ``y`` or a view of all that it holds."""
    alike = (x.shape, x.dtype, x.data_ptr()) == (y.shape, y.dtype, y.data_ptr())
    return alike and x.is_contiguous() and y.is_contiguous()
