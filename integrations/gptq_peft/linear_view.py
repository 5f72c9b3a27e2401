"""Lets peft take a quantized layer for ``nn.Linear`` while it looks for layers to put adapters on."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import nn

from gptq_backend import QuantEmbedding, QuantLinear


class _View:
    """Marks the classes that :func:`_view_of` makes."""

    quantized_class: Any


@functools.cache
def _view_of(quantized: Any) -> Any:
    """A class with all that ``quantized`` has, which is a subclass of ``nn.Linear`` too.

    Its ``weight`` is that of ``QuantLinear``: dequantized when it is used, and not kept.
    """
    bases: tuple[Any, ...] = (_View, quantized, nn.Linear)
    return type(quantized.__name__, bases, {"__module__": quantized.__module__, "quantized_class": quantized})


@contextmanager
def seen_as_linear(model: nn.Module) -> Iterator[None]:
    """Inside, ``isinstance(layer, nn.Linear)`` holds for the quantized layers of ``model``, and nothing else changes.

    peft asks this of every layer in some forty places. Afterwards each layer has its own class again, also those that
    peft has copied in between. Nor does the model look quantized: peft would ask for gptqmodel, or refuse.
    """
    with unmarked(model), _other_classes(model):
        yield


@contextmanager
def unmarked(model: nn.Module) -> Iterator[None]:
    """Inside, ``model`` does not say ``quantization_method: gptq``."""
    marks = {key: vars(model).pop(key) for key in ("quantization_method",) if key in vars(model)}
    try:
        yield
    finally:
        vars(model).update(marks)


@contextmanager
def _other_classes(model: nn.Module) -> Iterator[None]:
    outermost = not any(isinstance(module, _View) for module in model.modules())
    for module in model.modules():
        if isinstance(module, QuantLinear) and not isinstance(module, _View | QuantEmbedding):
            quantized: Any = type(module)
            module.__class__ = _view_of(quantized)
    try:
        yield
    finally:
        if outermost:
            for module in model.modules():
                if isinstance(module, _View):
                    module.__class__ = module.quantized_class
