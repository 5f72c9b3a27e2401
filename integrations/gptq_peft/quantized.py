"""Finds the quantized layers that adapters lie on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from gptq_backend import QuantLinear, TiedHead


def base_of(tuner_layer: Any) -> QuantLinear | None:
    """The quantized layer at the bottom of ``tuner_layer``, or None if another is there."""
    base = tuner_layer.get_base_layer()
    return base if isinstance(base, QuantLinear) else None


def has_quantized(model: nn.Module) -> bool:
    """Whether any layer of ``model`` is quantized."""
    return any(isinstance(module, QuantLinear | TiedHead) for module in model.modules())


def is_loaded(model: Any) -> bool:
    """Whether gptq_transformers has loaded or quantized ``model``, hence is imported."""
    return bool(getattr(model, "is_quantized", False))


def adapted_layers(model: nn.Module) -> Iterator[tuple[Any, QuantLinear]]:
    """Tuner layers of ``model`` with the quantized layers at their bottoms."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    for module in model.modules():
        if isinstance(module, BaseTunerLayer) and (layer := base_of(module)) is not None:
            yield module, layer
