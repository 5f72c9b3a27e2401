"""Lets the loop of a model over its layers call one thing that does what all of them do."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend.kernels import cpu_layers, operators_are_seen

from . import ahead
from .cache import Filled, filled_of, keep_filled, room_of, rooms_of
from .chain import Chain, Joint
from .forward import FusedForward
from .loop import Loop, find_loop
from .match import NoMatch


class LayerList(nn.ModuleList):
    """A model's list of layers, which is an ``nn.ModuleList`` for all but one loop: that of the model's ``forward``."""

    _loop: Loop | None = None
    _stack: Stack | None = None

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, slice):
            return super().__getitem__(index)
        layers = list(self._modules.values())[index]
        if not torch.compiler.is_compiling() and (stack := self._stack_for(sys._getframe(1), layers)) is not None:
            return [stack]
        return nn.ModuleList(layers)

    def __iter__(self) -> Any:
        if not torch.compiler.is_compiling():
            stack = self._stack_for(sys._getframe(1), list(self._modules.values()))
            if stack is not None:
                return iter([stack])
        return super().__iter__()

    def _stack_for(self, caller: FrameType, layers: list[Any]) -> Stack | None:
        """What stands for ``layers`` in the caller, where that is the loop and nobody looks at operators."""
        loop = self._loop
        if loop is None or caller.f_code is not loop.code or torch.is_grad_enabled() or operators_are_seen():
            return None
        if not layers or (loop.reads and not loop.calls_alike(caller.f_locals[loop.model], layers)):
            return None
        if self._stack is None or self._stack.layers != layers:
            self._stack = Stack(layers)
        return self._stack

    def _get_name(self) -> str:
        return nn.ModuleList.__name__

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles."""
        return vars(self) | {"_stack": None}


class Stack:
    """Stands for layers that are called with the same arguments, each with what the one before gave."""

    def __init__(self, layers: list[Any]) -> None:
        self.layers = layers

    def __getattr__(self, name: str) -> Any:
        """What a loop reads of one, which is the same for all."""
        if name.startswith("__"):
            raise AttributeError(name)  # Python asks a copy for some before it has layers
        return getattr(self.layers[0], name)

    def __call__(self, hidden_states: Tensor, **kwargs: Any) -> Any:
        y = self._in_one_call(hidden_states, kwargs)
        if y is None:
            y = hidden_states
            for layer in self.layers:
                y = layer(y, **kwargs)
        return y

    def _in_one_call(self, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
        first = vars(self.layers[0]).get("forward")
        chain = first.link.chain if isinstance(first, FusedForward) else None
        if chain is None or not chain.whole or len(chain.links) != len(self.layers) or not first.may_serve(x, kwargs):
            return None
        joint = chain.joint
        if joint is None or joint.layers is not self.layers:
            joint = chain.joint = self._joint(chain)
        return None if joint is None else _run(chain, joint, x, kwargs)

    def _joint(self, chain: Chain) -> Joint | None:
        """What looks at all layers, if the chain is theirs."""
        forwards = [vars(layer).get("forward") for layer in self.layers]
        fused = [each for each in forwards if isinstance(each, FusedForward)]
        watches = [each.watch for each in fused if each.watch is not None]
        if [each.link for each in fused] != chain.links or len(watches) != len(self.layers):
            return None
        return Joint(chain, self.layers, watches)


def _run(chain: Chain, joint: Joint, x: Tensor, kwargs: dict[str, Any]) -> Tensor | None:
    """What the last layer gives; None where they do not run in one call.

    Args:
        kwargs: what each is called with, but for its input.
    """
    ahead.drop_rest()
    mask, _, cache = given = ahead.given_of(kwargs)
    filled = _filled(chain, cache, x)
    beginning = None if filled is None else chain.calls[0].begin(x, given, filled.length)
    if filled is None or beginning is None or not chain.fits(beginning) or not joint.untouched():
        return None
    ending = chain.links[-1].ending
    call = None if ending is None else ending.call_for(x)
    rooms = [room.place for room in filled.rooms]
    lengths = [filled.length] * len(rooms)
    results = cpu_layers.run_layers(chain.layers, rooms, lengths, x, beginning.angles, mask, call)
    computed = ahead.Computed(chain.calls, results, None if call is None else ending)
    if not all(map(computed.stands, chain.mixtures)):
        return None
    filled.give(filled.length + x.shape[1])
    keep_filled(cache, filled)
    return computed.give_last(chain.links[-1])


def _filled(chain: Chain, cache: Any, x: Tensor) -> Filled | None:
    """The layers of the cache, if each has room for x [B, T, H]."""
    indices, count = [calls.index for calls in chain.calls], x.shape[1]
    filled = filled_of(cache)
    if filled is not None and filled.serves(cache, indices, count, chain):
        return filled
    first = room_of(cache, indices[0], count)
    held = [] if first is None else rooms_of(cache, indices, count, first[0].keys.shape[2])
    if len(held) < len(indices) or not all(room.fits(layer, x) for layer, (_, room) in zip(chain.layers, held)):
        return None
    return Filled(held, chain)


def join_loop(model: nn.Module, layers: list[Any]) -> None:
    """Let the loop of ``model`` over ``layers`` call one thing, if it does nothing but call them.

    Raises:
        NoMatch: it does more, or there are other layers, too.
    """
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.ModuleList and list(child) == layers:
                loop = find_loop(type(parent), name)
                child.__class__ = LayerList
                vars(child)["_loop"] = loop
                return
    raise NoMatch("its layers are not all in one list")


def leave_loop(layers: nn.Module) -> None:
    """Undo :func:`join_loop`, if ``layers`` are such a list."""
    if isinstance(layers, LayerList):
        vars(layers).pop("_loop", None)
        vars(layers).pop("_stack", None)
        layers.__class__ = nn.ModuleList  # type: ignore[assignment]
