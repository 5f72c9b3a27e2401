"""To which tensor is a layer's output added? Found by trying, so that no names and no structure are assumed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

BLOCK = ""  # the place where a block begins; other places are called as the module is whose input is meant


@dataclass(eq=False)
class Trace:
    """What one pass through a block shows."""

    inputs: dict[nn.Module, Tensor] = field(default_factory=dict)  # of layers, at their first call
    places: dict[str, Tensor] = field(default_factory=dict)  # what comes to places of the block


class Additions:
    """The places where the tensors are that a block's layers add to; found in the first pass with a finite output."""

    def __init__(self, block: nn.Module, layers: Iterable[nn.Module]) -> None:
        self.block, self.layers = block, set(layers)
        self.of: dict[nn.Module, str] | None = None  # layer -> place, without those that add to none; None yet

    def trace(self, x: Any, run: Callable[[], Any], output_of: Callable[[Any], Any]) -> tuple[Any, Trace]:
        """Run the block.

        Args:
            x: what the block is called with.
            run: the call.
            output_of: finds the tensor in what it returns.

        Returns:
            What ``run`` returns, and what was seen: no more places than :attr:`of` needs.
        """
        found, seen = Trace(), list[Tensor]()
        outputs: dict[nn.Module, tuple[Tensor, int]] = {}  # by layer, with how many places had been seen before
        wanted = None if self.of is None else set(self.of.values())

        def enter(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
                value = next(iter((*args, *kwargs.values())), None)
                if not isinstance(value, Tensor):
                    return
                if module in self.layers:
                    found.inputs.setdefault(module, value)
                if (wanted is None or name in wanted) and name not in found.places:
                    found.places[name] = value
                    seen.append(value)

            return hook

        def leave(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if isinstance(output, Tensor):
                outputs.setdefault(module, (output, len(seen)))

        if isinstance(x, Tensor) and (wanted is None or BLOCK in wanted):
            found.places[BLOCK] = x
            seen.append(x)
        with ExitStack() as hooks:
            for name, module in self.block.named_modules():
                if module is self.block or (wanted is not None and name not in wanted and module not in self.layers):
                    continue
                hooks.callback(module.register_forward_pre_hook(enter(name), with_kwargs=True).remove)
                if self.of is None and module in self.layers:
                    hooks.callback(module.register_forward_hook(leave).remove)
            output = run()
        if self.of is None:
            ends = [*seen, output_of(output)]
            pairs = ((layer, _place(found.places, ends, *made)) for layer, made in outputs.items())
            of = {layer: place for layer, place in pairs if place is not None}
            found.places = {name: found.places[name] for name in of.values()}
            if not isinstance(ends[-1], Tensor) or ends[-1].isfinite().any():
                self.of = of
        return output, found


def _place(places: Mapping[str, Tensor], ends: list[Any], output: Tensor, before: int) -> str | None:
    """Where the tensor came by that ``output`` was added to.

    Args:
        places: what came to each place, in the order of time.
        ends: all of these, and what the block returned.
        before: how many of them were there before ``output`` was.
    """
    for name, start in list(places.items())[:before]:
        if start.shape != output.shape:
            continue
        total = start.to(output.device) + output  # a block's input may come from another device
        if any(_same(end, total) for end in ends[before:]):
            return name
    return None


def _same(found: Any, expected: Tensor) -> bool:
    """Whether this is the tensor; the NaN of a spoilt token is like any other, but tells nothing by itself."""
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    found = found.to(expected.device)
    alike = found == expected
    return bool(alike.any()) and bool((alike | (found.isnan() & expected.isnan())).all())
