"""Appends a few tokens to transformers' growing cache without copying what it holds."""

from __future__ import annotations

import weakref
from operator import is_
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from gptq_backend.kernels import cpu_layers, places

_ROOM, _FILLED = "_gptq_backend_room", "_gptq_backend_filled"
_UPDATES = DynamicCache.update, DynamicLayer.update  # whoever puts others in their place wants to be called


class Room:
    """Longer tensors [B, KV, capacity, D], of whose begin the cache's keys and values are views."""

    def __init__(self, keys: Tensor, values: Tensor, views: tuple[Tensor, Tensor]) -> None:
        self.keys, self.values = keys, values
        self.views = views  # those given out last; behind any others somebody has written
        # id() of the cache's layer that may write; a shallow copy of it, in another thread too, may not.
        self.owner = 0
        same = keys.shape == values.shape and keys.dtype == values.dtype
        self._place = cpu_layers.Room(keys, values) if same and keys.is_cpu else None

    @property
    def place(self) -> cpu_layers.Room:
        """For calls that write into it; ask ``fits`` first."""
        assert self._place is not None
        return self._place

    def fits(self, layer: cpu_layers.Layer, x: Tensor) -> bool:
        """Whether such a call for x [B, T, H] can."""
        return self._place is not None and self._place.fits(layer, x)

    def serves(self, layer: Any, count: int) -> bool:
        """Whether ``count`` more positions fit, and nobody else set the layer's tensors."""
        return (
            self.owner == id(layer)
            and layer.keys is self.views[0]
            and layer.values is self.views[1]
            and layer.keys.shape[2] + count <= self.keys.shape[2]
            and self.keys.is_inference() == torch.is_inference_mode_enabled()
        )

    def views_of(self, length: int) -> tuple[Tensor, Tensor]:
        """Keys and values of so many positions."""
        return self.keys.narrow(2, 0, length), self.values.narrow(2, 0, length)

    def give(self, layer: Any, views: tuple[Tensor, Tensor]) -> None:
        """Let the layer see these keys and values, which are views of those here."""
        layer.keys, layer.values = self.views = views
        self.owner = id(layer)
        setattr(layer, _ROOM, self)


def room_of(cache: Any, index: int, count: int) -> tuple[Any, Room] | None:
    """The cache's layer ``index`` and the room that it has for ``count`` more positions, if it has."""
    layer = _plain_layer(cache, index)
    room = getattr(layer, _ROOM, None)
    return (layer, room) if room is not None and room.serves(layer, count) else None


def rooms_of(cache: Any, indices: list[int], count: int, length: int) -> list[tuple[Any, Room]]:
    """Likewise of several layers, up to the first that has none or does not hold ``length`` positions.

    No layer comes twice.
    """
    found: list[tuple[Any, Room]] = []
    if not _is_plain(cache):
        return found
    layers, seen = cache.layers, set()
    for index in indices:
        layer: Any = layers[index] if index < len(layers) else None
        state = vars(layer) if type(layer) is DynamicLayer else {}
        room = None if "update" in state else state.get(_ROOM)
        if room is None or not room.serves(layer, count) or layer.keys.shape[2] != length or id(layer) in seen:
            break
        seen.add(id(layer))
        found.append((layer, room))
    return found


class Filled:
    """Layers of a cache as one call left them, so that one look tells whether they still are.

    Args:
        held: those layers and the room of each, as :func:`rooms_of` finds them.
        filler: what fills them. It writes one kind of tensors.
    """

    def __init__(self, held: list[tuple[Any, Room]], filler: Any) -> None:
        self.layers, self.rooms = [layer for layer, _ in held], [room for _, room in held]
        self._states = tuple(map(vars, self.layers))
        self._updates = ("update",) * len(held)
        self._filler = weakref.ref(filler)
        self._inference = self.rooms[0].keys.is_inference()
        self._capacity = min(room.keys.shape[2] for room in self.rooms)
        self.length = self.layers[0].keys.shape[2]
        rooms, count = tuple(map(vars, self.rooms)), len(held)
        self._dicts = (*self._states * 3, *rooms)
        self._keys = tuple(name for name in (_ROOM, "keys", "values", "owner") for _ in range(count))
        self._values: tuple[Any, ...] = ()

    def serves(self, cache: Any, indices: list[int], count: int, filler: Any) -> bool:
        """Whether its layers of these indices are what they were, and have room for ``count`` more positions."""
        return (
            self._filler() is filler
            and _is_plain(cache)
            and max(indices) < len(cache.layers)
            and all(map(is_, map(cache.layers.__getitem__, indices), self.layers))
            and self.length + count <= self._capacity
            and self._inference == torch.is_inference_mode_enabled()
            and set(map(type, self.layers)) == {DynamicLayer}
            and places.untouched([(self._dicts, self._keys, self._values, self._states, self._updates)])
        )

    def give(self, length: int) -> None:
        """Let each layer see so many positions."""
        grown = [room.views_of(length) for room in self.rooms]
        for layer, room, views in zip(self.layers, self.rooms, grown):
            room.give(layer, views)
        keys, values = zip(*grown)
        self.length, self._values = length, (*self.rooms, *keys, *values, *(room.owner for room in self.rooms))

    def __reduce__(self) -> tuple[Any, ...]:
        """A copy of a cache has layers of its own."""
        return _nothing, ()


def _nothing() -> None:
    """Takes its place."""


def filled_of(cache: Any) -> Filled | None:
    """What :func:`keep_filled` left there."""
    return getattr(cache, _FILLED, None)


def keep_filled(cache: Any, filled: Filled) -> None:
    setattr(cache, _FILLED, filled)


def append(cache: Any, keys: Tensor, values: Tensor, index: int, *more: Any) -> tuple[Tensor, Tensor]:
    """``cache.update(keys, values, index, *more)``.

    transformers' own cache copies all keys and values for every token. Here those of one layer lie in tensors with
    room for more; what was handed out before stays as it is, as only what lies behind it is written to.

    Args:
        keys, values: [B, KV, T, D].

    Returns:
        All of them, [B, KV, S, D].
    """
    layer = _plain_layer(cache, index)
    if layer is None or not _alike(keys, layer.keys) or not _alike(values, layer.values):
        return cache.update(keys, values, index, *more)
    room = _with_room(layer, keys.shape[2])
    first, last = layer.keys.shape[2], layer.keys.shape[2] + keys.shape[2]
    room.keys[:, :, first:last] = keys
    room.values[:, :, first:last] = values
    views = room.views_of(last)
    room.give(layer, views)
    return views


def _alike(a: Tensor, b: Tensor) -> bool:
    """Whether they can lie in one tensor, one behind the other."""
    return a.dtype == b.dtype and a.device == b.device and (*a.shape[:2], a.shape[3]) == (*b.shape[:2], b.shape[3])


def _is_plain(cache: Any) -> bool:
    """Whether it is transformers' own, which nobody patched."""
    return (
        type(cache) is DynamicCache
        and not getattr(cache, "offloading", False)
        and "update" not in vars(cache)
        and (DynamicCache.update, DynamicLayer.update) == _UPDATES
    )


def _plain_layer(cache: Any, index: int) -> Any:
    """The layer ``index`` if it only grows and holds something already, else None."""
    if not _is_plain(cache) or index >= len(cache.layers):
        return None
    layer = cache.layers[index]
    if type(layer) is not DynamicLayer or not layer.get_seq_length() or "update" in vars(layer):
        return None
    return layer


def _with_room(layer: Any, count: int) -> Room:
    """The room behind the layer's tensors; new where there is none, too little, or somebody else set the tensors."""
    room = getattr(layer, _ROOM, None)
    if room is not None and room.serves(layer, count):
        return room
    length = layer.keys.shape[2]
    capacity = length + count + max(64, length // 4)
    longer = []
    for tensor in (layer.keys, layer.values):
        buffer = tensor.new_empty((*tensor.shape[:2], capacity, tensor.shape[3]))
        buffer[:, :, :length] = tensor
        longer.append(buffer)
    return Room(longer[0], longer[1], (layer.keys, layer.values))
