"""``merge_and_unload()``: adapters are merged into dense layers, which take the places of the quantized ones."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gptq_backend import ConfigError, QuantLinear
from gptq_backend.module_moves import offloading_hook

from .linear_view import unmarked
from .quantized import adapted_layers, base_of, is_loaded


def merge_onto_dense(original: Any, tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """Around a tuner's ``_unload_and_optionally_merge``, which is to merge.

    Layers under adapters become ``nn.Linear`` in the dtype that a dense layer would have; others stay quantized. If
    none does, the model forgets that it was quantized.

    Raises:
        ConfigError: weights are offloaded; nothing was changed.
    """
    tuner_layers = [tuner_layer for tuner_layer, _ in adapted_layers(tuner)]  # no layer, which is freed when merged
    _check_present(tuner)
    loaded = is_loaded(tuner.model)  # else the layers were put there by hand
    if loaded:
        from gptq_transformers.changes import let_go, settle

        let_go(tuner.model)
    with unmarked(tuner.model), _dense_merges(tuner_layers):
        model = original(tuner, True, *args, **kwargs)
    if loaded:
        settle(model)
    return model


def refuse_merging_in_place(tuner: Any) -> None:
    """``merge_adapter()`` would write to the packed weight and take it back later.

    Raises:
        ConfigError: an adapter lies on a quantized layer.
    """
    for _, layer in adapted_layers(tuner):
        raise ConfigError(
            f"merge_adapter() cannot write to {layer.name}, which is quantized to {layer.stored_spec.bits} bits; use "
            "merge_and_unload(), which makes the layers under the adapters dense"
        )


def _check_present(tuner: Any) -> None:
    for _, layer in adapted_layers(tuner):
        if offloading_hook(layer) is not None or any(parameter.is_meta for parameter in layer.parameters()):
            raise ConfigError(
                f"{layer.name}: its weights are offloaded; load the model without offloading to merge an adapter into "
                "it"
            )


@contextmanager
def _dense_merges(tuner_layers: list[Any]) -> Iterator[None]:
    """Inside, these layers merge into a dense layer that takes the place of the quantized one.

    One after the other, so that what is in memory grows from the packed model to the dense one and never beyond.
    """
    for layer in tuner_layers:
        layer.merge = functools.partial(_merge, layer)
    try:
        yield
    finally:
        for layer in tuner_layers:
            vars(layer).pop("merge", None)


def _merge(tuner_layer: Any, *args: Any, **kwargs: Any) -> None:
    """As the layer's class merges, in float32, rounded once."""
    quantized = base_of(tuner_layer)
    if quantized is None:  # an adapter below this one has merged
        type(tuner_layer).merge(tuner_layer, *args, **kwargs)
        return
    dense = quantized.dequantize(torch.float32).requires_grad_(False)
    dense.train(quantized.training)
    _move_hook(quantized, dense)
    bottom = tuner_layer
    while bottom.base_layer is not quantized:
        bottom = bottom.base_layer
    bottom.base_layer = dense
    type(tuner_layer).merge(tuner_layer, *args, **kwargs)
    dense.to(quantized.compute_dtype)


def _move_hook(quantized: QuantLinear, dense: nn.Module) -> None:
    """accelerate's, which moves the layer's input to its device."""
    if (hook := getattr(quantized, "_hf_hook", None)) is not None:
        from accelerate.hooks import add_hook_to_module

        add_hook_to_module(dense, hook)
