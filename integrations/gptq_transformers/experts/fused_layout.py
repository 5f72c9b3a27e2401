"""How transformers stores the experts of a layer in one module: two 3-D parameters, in several layouts."""

from __future__ import annotations

import copy
import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FusedLayout:
    """How a fused module stores its experts, and how it is called.

    Args:
        first: name of the parameter before the activation: ``gate_up_proj``, or ``up_proj`` where there is no gate.
        transposed: matrices are [in, out] instead of [out, in].
        concatenated: gate rows lie before up rows; otherwise they alternate.
        biased: there are ``{first}_bias`` [E, out] and ``down_proj_bias``.
        sorted_rows: it is called with as many rows for each expert, one after the other, and no routing: the rows of
            tokens that the router did not choose are zeros.
        passing: so many experts after the last one hand on what they get.
    """

    first: str
    transposed: bool
    concatenated: bool = True
    biased: bool = False
    sorted_rows: bool = False
    passing: int = 0

    @property
    def parameters(self) -> tuple[str, ...]:
        names = (self.first, "down_proj")
        return names + tuple(f"{name}_bias" for name in names) if self.biased else names

    @property
    def gated(self) -> bool:
        return self.first == "gate_up_proj"


def fused_layout(module: nn.Module) -> FusedLayout | None:
    """None when the module holds no fused experts that are understood.

    Modules with transformers' ``use_experts_implementation`` say how they are stored. Of others it is tried out whether
    they compute what their shapes suggest.
    """
    parameters = module._parameters
    if not hasattr(module, "is_transposed") or not hasattr(module, "has_bias"):
        shapes = {name: parameter.shape for name, parameter in parameters.items() if parameter is not None}
        return _tried(module, shapes) if shapes.keys() == {"gate_up_proj", "down_proj"} else None
    layout = FusedLayout(
        first="gate_up_proj" if getattr(module, "has_gate", True) else "up_proj",
        transposed=bool(module.is_transposed),
        concatenated=bool(getattr(module, "is_concatenated", True)),
        biased=bool(module.has_bias),
    )
    if set(parameters) != set(layout.parameters):
        return None
    return layout if all(module.get_parameter(name).dim() == 3 for name in (layout.first, "down_proj")) else None


_found: dict[tuple[Any, ...], FusedLayout | None] = {}


def _tried(module: nn.Module, shapes: dict[str, torch.Size]) -> FusedLayout | None:
    first, down = shapes["gate_up_proj"], shapes["down_proj"]
    if not len(first) == len(down) == 3 or not callable(getattr(module, "act_fn", None)):
        return None
    key = (type(module), first, down)
    if key not in _found:
        transposed = first[1:] == (down[2], 2 * down[1])
        rows = len(inspect.signature(type(module).forward).parameters) == 2  # self and those
        layout = FusedLayout("gate_up_proj", transposed, sorted_rows=rows, passing=first[0] - down[0])
        fits = transposed or first[1:] == (2 * down[2], down[1])
        _found[key] = layout if fits and _computes(module, layout, first, down) else None
    return _found[key]


def _computes(module: nn.Module, layout: FusedLayout, first: torch.Size, down: torch.Size) -> bool:
    """Whether the module, with random weights that all experts share, gives what ``layout`` means on two tokens."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*size: int) -> Tensor:
        return torch.randn(size, generator=generator, device="cpu") / size[-1] ** 0.5

    weights = {"gate_up_proj": numbers(1, *first[1:]), "down_proj": numbers(1, *down[1:])}
    trial: Any = copy.copy(module)
    trial.__dict__["_parameters"] = {
        name: weight.expand(count, -1, -1)
        for (name, weight), count in zip(weights.items(), (first[0], down[0]), strict=True)
    }
    gate_up, last = (weight[0] if layout.transposed else weight[0].t() for weight in weights.values())
    x = numbers(2, gate_up.shape[0])
    forward: Any = type(module).forward
    try:
        with torch.no_grad(), torch.device("cpu"):
            gate, up = (x @ gate_up).chunk(2, -1)
            expected = (trial.act_fn(gate) * up) @ last
            if layout.sorted_rows:
                return _same(forward(trial, x.repeat(down[0], 1)), expected.repeat(down[0], 1))
            index, weight = torch.zeros(2, 2, dtype=torch.long), torch.tensor([0.25, 0.5]).expand(2, 2)
            if not _same(forward(trial, x, index, weight), 0.75 * expected):
                return False
            return not layout.passing or _same(forward(trial, x, index + down[0], weight), 0.75 * x)
    except Exception:  # whatever the code of a model raises for what it was not made for
        return False


def _same(found: Any, expected: Tensor) -> bool:
    shaped = isinstance(found, Tensor) and found.shape == expected.shape
    return shaped and torch.allclose(found, expected, rtol=1e-3, atol=1e-3)
