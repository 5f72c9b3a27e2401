"""The experts of a layer multiplied in one call per projection, where all are quantized and have the same form."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module

from gptq_backend import QuantLinear
from gptq_backend.kernels import Grouped, PreparedWeight, Routing, cpu_experts, one_by_one, places, why_not_groupable

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class GroupedExperts:
    """How the projections of a layer's experts are multiplied, found out once.

    The tensors of layers that have the same form become slices of one stack, so that each layer still serves by itself:
    to be saved, moved and dequantized, and for gradients. Whoever changes one of them afterwards, or puts another
    module in its place, ends :meth:`current`.

    Args:
        layers_at: for each projection, in the order gate, up, down, or up, down, where its layer is for each expert:
            the children of its parent, and its name among them.
        activation: what lies between the products, of ``cpu_block.ACTIVATIONS``, or None.
        parents_at: likewise where other modules are that must stay in their places.

    Attributes:
        obstacles: for each projection that cannot be grouped, why.
        one_call: all of it for few tokens; None where there is no such call.
    """

    def __init__(
        self,
        layers_at: Mapping[str, Sequence[tuple[dict[str, Any], str]]],
        activation: str | None = None,
        parents_at: Sequence[tuple[dict[str, Any], str]] = (),
    ) -> None:
        self.obstacles: list[str] = []
        self._stacks: list[Grouped] = []
        self.before: list[_Call] = []
        self.after: list[_Call] = []
        names = [*layers_at]
        columns = {path: [children[name] for children, name in column] for path, column in layers_at.items()}
        self.one_call: cpu_experts.ExpertMLPs | None = None
        self._grouped = all(isinstance(layer, QuantLinear) for column in columns.values() for layer in column)
        if self._grouped:
            self.before = self._calls({name: columns[name] for name in names[:-1]})
            self.after = self._calls({names[-1]: columns[names[-1]]})
            self._grouped = len(self.obstacles) < len(names)
            self.one_call = self._whole(activation)
        else:
            self.obstacles.append("they are not all quantized")
        self._held: list[_Held] = [
            (children, name, children[name], getattr(children[name], "changes", 0))
            for column in (*layers_at.values(), parents_at)
            for children, name in column
        ]
        layers = [layer.__dict__ for column in columns.values() for layer in column]
        changes = [(layer, "changes", layer.get("changes")) for layer in layers]
        self._dicts, self._names, self._objects = zip(*(held[:3] for held in self._held), *changes)
        self._layers = tuple(layers) * 2
        self._hooks = ("_forward_hooks",) * len(layers) + ("_forward_pre_hooks",) * len(layers)
        self._watches: list[_Watch] = []  # of each expert
        if self.one_call is not None:
            parents = {id(place[name]._modules): (place, name, place[name]) for place, name in parents_at}
            self._watches = [_watch_of(of_expert, parents) for of_expert in zip(*layers_at.values())]
        self._biased = [layer for _, _, layer, _ in self._held if getattr(layer, "bias", None) is not None]

    def _calls(self, columns: dict[str, list[Any]]) -> list[_Call]:
        """One product for all columns, or one for each."""
        layers = [layer for column in columns.values() for layer in column]
        why = _obstacle(layers)
        if why is None:
            self._stacks.append(_stack(layers))
            return [_call(self._stacks[-1], len(columns))]
        if len(columns) > 1:
            return [call for name, column in columns.items() for call in self._calls({name: column})]
        for layer in layers:
            if not layer._parameters["qweight"].is_meta:
                layer.prepare(expert=False)
        self.obstacles.append(f"{', '.join(columns)}: they {why}")

        @torch.compiler.disable  # how many rows a layer gets is data
        def multiply(x: Tensor, routing: Routing, top_k: int) -> list[Tensor]:
            return [one_by_one(layers, layers[0].out_features, x, routing, top_k)]

        return [multiply]

    def _whole(self, activation: str | None) -> cpu_experts.ExpertMLPs | None:
        if activation is None or len(self._stacks) != 2 or not len(self.before) == len(self.after) == 1:
            return None
        gate_up, down = self._stacks
        return None if cpu_experts.why_not(gate_up, down) else cpu_experts.ExpertMLPs(gate_up, down, activation)

    def current(self) -> bool:
        """Whether the layers are still in their places and hold what they held; a graph is guarded by the same."""
        if self.one_call is not None and not torch.compiler.is_compiling():  # there are hundreds, and C++ for that
            return places.unchanged(self._dicts, self._names, self._objects)
        for place, name, layer, changes in self._held:
            if place[name] is not layer or getattr(layer, "changes", 0) != changes:
                return False
        return True

    def untouched(self, experts: Iterable[int]) -> bool:
        """Whether the layers of these experts hold what lies in the stacks, and nobody hears when they are called."""
        watches = [self._watches[i] for i in experts]
        return places.untouched(watches) and all(
            tuple(map(Tensor.data_ptr, tensors)) == addresses for *_, tensors, addresses in watches
        )

    def serve(self, x: Tensor) -> bool:
        """Whether a projection is grouped, and nothing needs the layers to be called: no gradient, no hook."""
        if not self._grouped or x.dtype not in _DTYPES:
            return False
        gradients = torch.is_grad_enabled()
        if gradients and x.requires_grad:
            return False
        if self._hooked():
            return False
        return not (gradients and any(layer.bias.requires_grad for layer in self._biased))

    def _hooked(self) -> bool:
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return True
        if self.one_call is not None and not torch.compiler.is_compiling():
            return not places.empty(self._layers, self._hooks)
        return any(layer[name] for layer, name in zip(self._layers, self._hooks))


# A layer where it was found, place[name], and how often it had changed.
_Held = tuple[dict[str, Any], str, Any, int]
# Of one expert: dictionaries, keys in them and what lies there; dictionaries, and keys of hooks in them; scales and
# biases, and their addresses.
_Watch = tuple[tuple[Any, ...], ...]
_PARAMETERS = "qweight", "scales", "zeros", "bias"
_HOOKS = "_forward_hooks", "_forward_pre_hooks", "forward"


def _watch_of(
    layers_at: Sequence[tuple[dict[str, Any], str]], parents: Mapping[int, tuple[dict[str, Any], str, Any]]
) -> _Watch:
    """All that must stay as it is for the stacks to give what these layers would."""
    found = [parents[id(place)] for place, _ in layers_at if id(place) in parents]
    for place, name in layers_at:
        layer, held = place[name], place[name]._parameters
        found += [
            (place, name, layer),
            (layer.__dict__, "changes", layer.changes),
        ]
        found += [(held, key, held.get(key)) for key in _PARAMETERS]
    dicts, names, values = zip(*found)
    tensors = tuple(value for value in values if isinstance(value, Tensor) and value.is_floating_point())
    listeners, hooks = zip(*((place[name].__dict__, key) for place, name in layers_at for key in _HOOKS))
    return dicts, names, values, listeners, hooks, tensors, tuple(map(Tensor.data_ptr, tensors))


def _stack(layers: Sequence[QuantLinear]) -> Grouped:
    """The product of layers without an obstacle, those of the first projection first, which become slices of it."""
    grouped = Grouped(_prepared(layers), [layer.bias for layer in layers])
    for i, layer in enumerate(layers):
        held = {key: value[i] for key, value in grouped.named_parameters()}
        bias = held.pop("bias", None)
        layer.hold(held)
        if bias is not None:
            layer.bias = nn.Parameter(bias, layer.bias.requires_grad)  # type: ignore[union-attr]
    return grouped


def _call(grouped: Grouped, projections: int) -> _Call:
    def multiply(x: Tensor, routing: Routing, top_k: int) -> list[Tensor]:
        return list(grouped(x, routing, top_k).chunk(projections, -1))

    return multiply


# x [rows / top_k, K] -> [rows, N] of each of its projections; rows of no expert are zeros.
_Call = Callable[[Tensor, Routing, int], list[Tensor]]


def _obstacle(layers: Sequence[QuantLinear]) -> str | None:
    """What keeps layers from being stacked, or None; prepares those that it can."""
    if any(layer._parameters["qweight"].is_meta for layer in layers):  # type: ignore[union-attr]
        return "are offloaded"
    if len({layer._parameters["qweight"].device for layer in layers}) > 1:  # type: ignore[union-attr]
        return "are on several devices"
    return why_not_groupable(_prepared(layers), [layer.bias for layer in layers])


def _prepared(layers: Sequence[QuantLinear]) -> list[PreparedWeight]:
    return [weight for layer in layers if (weight := layer.prepare(expert=True).prepared) is not None]
