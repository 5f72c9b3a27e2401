"""The layers that an adapter changed, quantized again with calibration: the pipeline of ``quantize`` on these alone."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq_backend import (
    ConfigError,
    Events,
    QuantizeConfig,
    QuantizedWeight,
    QuantizeReport,
    QuantLinear,
    RunOptions,
    quantize_model,
)
from gptq_backend.model import find_blocks, is_linear, replace_module

from ..config import GPTQConfig
from ..dispatch import keeping_hooks
from ..load_quantized import from_quantized
from .adapter import Adapter
from .base import Base


def open_model(
    base: Base, layers: list[str], trust_remote_code: bool, dtype: torch.dtype | str = "auto"
) -> PreTrainedModel:
    """The quantized model, without its layers fused: the pipeline visits each.

    Raises:
        ConfigError: it calls its layers otherwise than its files do. GPTQError: it cannot be loaded.
    """
    unfused = GPTQConfig(bits=base.config.bits, fuse=False)  # what is stored counts for all else
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="You passed `quantization_config`")
        options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
        model = from_quantized(base.folder, quantization_config=unfused, **options)
    modules = dict(model.named_modules())
    for layer in layers:
        if not isinstance(modules.get(layer), QuantLinear | nn.Linear | nn.Embedding):
            raise ConfigError(
                f"{type(model).__name__} has no layer called {layer}, as its file calls it, and cannot be run with the "
                "adapter merged; leave calibration out (--calibration none)"
            )
    return model


def quantize_again(
    model: PreTrainedModel,
    base: Base,
    adapter: Adapter,
    layers: list[str],
    samples: Any,
    options: RunOptions,
    events: Events,
    store: Callable[[str, Mapping[str, Tensor]], None],
) -> QuantizeReport:
    """Quantize ``layers`` of a model of :func:`open_model` anew, with what the adapter adds to them.

    Args:
        model: changed in place.
        samples: token ids to calibrate on.
        options: without ``before``.
        events: told of layers.
        store: given each layer's tensors when its block is done.
    """
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    placeholders = {name: _placeholder(model.get_submodule(name), dtype) for name in layers}
    for name, placeholder in placeholders.items():
        replace_module(model, name, placeholder)

    def fill(inside: Callable[[str], bool]) -> None:
        """Bring merged weights, of a block at a time."""
        for name in filter(inside, placeholders):
            weight, bias = base.merged(name, adapter)
            placeholders[name].weight = nn.Parameter(weight.to(dtype), requires_grad=False)
            if bias is not None:
                placeholders[name].bias = nn.Parameter(bias.to(dtype), requires_grad=False)

    blocks = find_blocks(model, options.block_name)
    outside = [name for name in layers if not any(name.startswith(f"{block}.") for block in blocks)]
    fill(outside.__contains__)
    fill_dense(model, base, adapter, layers)

    def before(name: str) -> QuantizedWeight | None:
        return base.quantized(name) if name in placeholders else None

    class Streaming(Events):
        """Brings a block's merged weights, and stores what they became."""

        layer_done = staticmethod(events.layer_done)

        def block_needed(self, name: str, block: nn.Module) -> None:
            fill(lambda layer: layer.startswith(f"{name}."))

        def block_done(self, name: str, block: nn.Module) -> None:
            for layer in layers:
                if layer.startswith(f"{name}."):
                    store(layer, model.get_submodule(layer).state_dict())

    config = _config(model, base, layers, outside)
    with keeping_hooks(model):
        report = quantize_model(
            model, config, samples, options=dataclasses.replace(options, before=before), events=Streaming()
        )
    for layer in outside:
        store(layer, model.get_submodule(layer).state_dict())
    return report


def _placeholder(layer: nn.Module, dtype: torch.dtype) -> nn.Linear:
    """A dense layer without weights yet."""
    assert isinstance(layer, QuantLinear)
    return nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta", dtype=dtype)


@torch.no_grad()
def fill_dense(model: nn.Module, base: Base, adapter: Adapter, layers: list[str]) -> None:
    """Give the model what the adapter changes in tensors that are not quantized."""
    for name, tensor in base.dense_changes(adapter):
        owner, _, key = name.rpartition(".")
        if owner not in layers:  # whose biases come with them
            getattr(model.get_submodule(owner), key).copy_(tensor)


def _config(model: nn.Module, base: Base, layers: list[str], outside: list[str]) -> QuantizeConfig:
    """The settings of the checkpoint for each layer of ``layers`` as it is stored; no other layer is quantized.

    outside: those of them that are in no block.
    """
    plain = dataclasses.replace(
        base.config,
        dynamic=None,
        lm_head=bool(outside),
        keep_edge_blocks=0,
        modules_in_block_to_quantize=None,
        # What makes up for other layers or rows would leave the grid that most of it is on.
        correct_drift=False,
        row_feedback=False,
        block_epochs=0,
        distill_epochs=0,
    )
    rules: dict[str, dict[str, Any]] = {}
    for name, module in model.named_modules():
        pattern = f"{re.escape(name)}$"
        if name in layers:
            spec, said = base.specs[name], base.config.for_module(name) or plain
            wanted = dataclasses.replace(said, dynamic=None, bits=spec.bits, sym=_is_symmetric(base, name))
            if spec.groups != -(-spec.in_features // _size(said, spec.in_features)):
                wanted = dataclasses.replace(wanted, group_size=spec.group_size)
            changed = {key: value for key in _LAYER if (value := getattr(wanted, key)) != getattr(plain, key)}
            if changed:
                rules[pattern] = changed
        elif is_linear(module):
            rules[f"-:{pattern}"] = {}
    return dataclasses.replace(plain, dynamic=rules or None)


_LAYER = ("bits", "group_size", "sym", "desc_act", "static_groups", "act_group_aware", "damp_percent")


def _size(config: QuantizeConfig, features: int) -> int:
    return features if config.group_size == -1 else config.group_size


def _is_symmetric(base: Base, name: str) -> bool:
    zeros = base.quantized(name).zeros
    return bool((zeros == 1 << (base.specs[name].bits - 1)).all())
