"""The experts of a mixture one by one: to call each with all tokens, or to learn what a router sends to each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

from torch import Tensor, nn


class _Experts(Protocol):
    """A module that calls its method ``expert`` for each expert that gets tokens."""

    num_experts: int

    def expert(self, index: int, x: Tensor) -> Tensor: ...

    def projections(self, index: int) -> Sequence[nn.Module]: ...

    def call_all(self, hidden_states: Tensor, *args: Any) -> None: ...


# Given the number of an expert, its tokens, and what applies it to them.
Instead = Callable[[int, Tensor, Callable[[Tensor], Tensor]], Tensor]


@dataclass(frozen=True, eq=False)
class Mixture:
    """A module that sends tokens [n, H] to experts, each of which returns [n, H].

    Args:
        module: its ``forward`` calls them.
        experts: the modules of each.
        call: applies an expert, by its number.
        call_all: calls every expert with all tokens, given the arguments of the module's ``forward``.
        replaced: within this context, something else is called wherever an expert would be.
    """

    module: nn.Module
    experts: tuple[frozenset[nn.Module], ...]
    call: Callable[[int, Tensor], Tensor]
    call_all: Callable[..., Any]
    replaced: Callable[[Instead], AbstractContextManager[None]]


def find_mixture(module: nn.Module) -> Mixture | None:
    """None if it is no mixture. That is a module with a ``call_all`` of its own, or one whose ``experts`` are a plain
    list.
    """
    if hasattr(module, "call_all"):
        return _of_own_kind(module, module)  # type: ignore[arg-type]
    experts = getattr(module, "experts", None)
    return _of_list(module, experts) if type(experts) is nn.ModuleList else None


def _of_own_kind(module: nn.Module, experts: _Experts) -> Mixture:
    @contextmanager
    def replaced(instead: Instead) -> Iterator[None]:
        original = experts.expert
        vars(module)["expert"] = lambda i, x: instead(i, x, partial(original, i))
        try:
            yield
        finally:
            del vars(module)["expert"]

    inside = tuple(
        frozenset(each for layer in experts.projections(i) for each in layer.modules())
        for i in range(experts.num_experts)
    )
    return Mixture(module, inside, lambda i, x: experts.expert(i, x), experts.call_all, replaced)


def _of_list(module: nn.Module, experts: nn.ModuleList) -> Mixture:
    def call_all(hidden_states: Any, *_: Any, **__: Any) -> None:
        x = hidden_states.reshape(-1, hidden_states.shape[-1])
        for expert in experts:
            expert(x)

    @contextmanager
    def replaced(instead: Instead) -> Iterator[None]:
        with ExitStack() as stack:
            for i, expert in enumerate(experts):
                own = vars(expert).get("forward")
                stack.callback(*((setattr, expert, "forward", own) if own else (delattr, expert, "forward")))
                expert.forward = partial(_forward, instead, i, expert.forward)
            yield

    inside = tuple(frozenset(expert.modules()) for expert in experts)
    return Mixture(module, inside, lambda i, x: experts[i](x), call_all, replaced)


def _forward(instead: Instead, i: int, original: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
    """The tokens are the first argument, whether it has a name or not."""
    if args:
        return instead(i, args[0], lambda x: original(x, *args[1:], **kwargs))
    name, tokens = next(iter(kwargs.items()))
    return instead(i, tokens, lambda x: original(**{**kwargs, name: x}))
