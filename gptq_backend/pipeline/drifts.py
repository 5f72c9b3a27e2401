"""What the original blocks do with the calibration data, beside what the quantized ones do: for drift.make_up."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from ..model.additions import BLOCK, Additions, Trace
from ..model.structure import Block
from ..training.blocks import output_tensor


class Drifts:
    """Of the block whose turn it is.

    Args:
        hooks: of the run; closed at its end.
        batch: the batch whose pass through the quantized block is running; None of any other call.
        aside: puts a tensor where it may wait.
    """

    def __init__(self, hooks: ExitStack, batch: Callable[[], int | None], aside: Callable[[Tensor], Tensor]) -> None:
        self._hooks, self._batch, self._aside = hooks, batch, aside
        self._block: Block | None = None
        self._additions: Additions | None = None  # of the block
        self._there: dict[int, Trace] = {}  # what was seen in the original block, by batch
        self._here: dict[int, dict[str, Tensor]] = {}  # what came to the same places in the quantized one

    def original(self, block: Block, number: int, x: Any, run: Callable[[], Any]) -> Any:
        """Call the original block with ``x`` of a batch, and keep what is needed of it."""
        if block is not self._block:
            layers = [target.module for target in block.targets]
            self._block, self._additions = block, Additions(block.module, layers)
            self._there, self._here = {}, {}
        assert self._additions is not None
        first = self._additions.of is None
        output, trace = self._additions.trace(x, run, output_tensor)
        seen = (*trace.inputs.values(), *trace.places.values())  # layers share inputs
        waiting = {id(tensor): self._aside(tensor) for tensor in {id(tensor): tensor for tensor in seen}.values()}
        trace.inputs = {layer: waiting[id(tensor)] for layer, tensor in trace.inputs.items()}
        trace.places = {place: waiting[id(tensor)] for place, tensor in trace.places.items()}
        self._there[number] = trace
        if first and self._additions.of is not None:
            self._watch(self._additions)
        return output

    def enter(self, block: Block, number: int, x: Any) -> None:
        """The quantized block is about to be called with ``x`` of a batch."""
        if block is self._block and isinstance(x, Tensor):
            self._here[number] = {BLOCK: x}

    def of(self, layer: nn.Module, number: int) -> tuple[Tensor | None, tuple[Tensor, Tensor] | None]:
        """For a batch, what the original block feeds a layer, and what the layer's output is added to: there and here.
        None where that is not known.
        """
        if self._additions is None or self._additions.of is None or (there := self._there.get(number)) is None:
            return None, None
        original, place = there.inputs.pop(layer, None), self._additions.of.get(layer)
        if place is None or (here := self._here.get(number, {}).get(place)) is None or place not in there.places:
            return original, None
        return original, (there.places[place], here)

    def _watch(self, additions: Additions) -> None:
        """See what comes to the places in the quantized block."""

        def see(place: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                if additions is self._additions and (number := self._batch()) in self._here:
                    # Of the first call, as in the original; later ones may be of other tensors.
                    self._here[number].setdefault(place, next(iter((*args, *kwargs.values()))))

            return hook

        for place in set((additions.of or {}).values()) - {BLOCK}:
            module = additions.block.get_submodule(place)
            self._hooks.callback(module.register_forward_pre_hook(see(place), with_kwargs=True).remove)
