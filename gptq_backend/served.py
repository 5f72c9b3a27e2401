"""What a quantized layer serves with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from .kernels.interface import PreparedWeight


@dataclass(eq=False)
class Served:
    """A prepared weight and its layer's parameters, in one object, so that both are replaced at once.

    It is no tuple: torch.export restores those among a module's attributes as copies, with the fake tensors that it
    traced with.

    Args:
        weight: its tensors are ``parameters``; None before the layer is prepared.
        parameters: of the layer, bias included.
    """

    weight: PreparedWeight | None
    parameters: dict[str, Any]
