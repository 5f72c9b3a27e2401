"""How transformers 5 stores the experts of a layer: two 3-D parameters in one module."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class FusedLayout:
    """How a fused module stores its experts.

    Args:
        first: name of the parameter before the activation: ``gate_up_proj``, or ``up_proj`` where there is no gate.
        transposed: matrices are [in, out] instead of [out, in].
        concatenated: gate rows lie before up rows; otherwise they alternate.
        biased: there are ``{first}_bias`` [E, out] and ``down_proj_bias``.
    """

    first: str
    transposed: bool
    concatenated: bool
    biased: bool

    @property
    def parameters(self) -> tuple[str, ...]:
        names = (self.first, "down_proj")
        return names + tuple(f"{name}_bias" for name in names) if self.biased else names

    @property
    def gated(self) -> bool:
        return self.first == "gate_up_proj"


def fused_layout(module: nn.Module) -> FusedLayout | None:
    """None when the module holds no fused experts in the way of transformers' ``use_experts_implementation``."""
    if not hasattr(module, "is_transposed") or not hasattr(module, "has_bias"):
        return None
    parameters = dict(module.named_parameters(recurse=False))
    layout = FusedLayout(
        first="gate_up_proj" if getattr(module, "has_gate", True) else "up_proj",
        transposed=bool(module.is_transposed),
        concatenated=bool(getattr(module, "is_concatenated", True)),
        biased=bool(module.has_bias),
    )
    if set(parameters) != set(layout.parameters):
        return None
    return layout if all(parameters[name].dim() == 3 for name in (layout.first, "down_proj")) else None
