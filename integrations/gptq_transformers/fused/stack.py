"""Lets the loop of a model over its layers call one thing that does what all of them do."""

from __future__ import annotations

import sys
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend.kernels import operators_are_seen

from . import ahead
from .chain import Joint
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
        if chain.joint is None or chain.joint.layers is not self.layers:
            forwards = [vars(layer).get("forward") for layer in self.layers]
            links = [each.link if isinstance(each, FusedForward) else None for each in forwards]
            watches = [each.watch for each in forwards]
            if links != chain.links or None in watches:
                return None
            chain.joint = Joint(chain, self.layers, watches)
        return ahead.run_all(chain, chain.joint, x, kwargs)


def join_loop(model: nn.Module, layers: list[Any]) -> None:
    """Let the loop of ``model`` over ``layers`` call one thing, if it does nothing but call them.

    Raises:
        NoMatch: it does more, or there are other layers, too.
    """
    for parent in model.modules():
        for name, child in parent.named_children():
            if type(child) is nn.ModuleList and len(child) == len(layers) and all(map(lambda a, b: a is b, child, layers)):
                loop = find_loop(type(parent), name)
                child.__class__ = LayerList
                child._loop = loop
                return
    raise NoMatch("its layers are not all in one list")
