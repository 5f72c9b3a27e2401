"""Rounds the output embedding of a loaded model to 8 or 4 bits: the largest single product of a decoding step."""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn

from gptq_backend import ConfigError, QuantizeConfig, QuantLinear, TiedHead
from gptq_backend.algorithm import round_to_nearest
from gptq_backend.model import replace_module

from .dispatch import keeping_hooks
from .quantized_layers import untie_quantized

BITS = (4, 8)
GROUP_SIZE = 64


def quantize_head(model: Any, bits: int) -> None:
    """Round the head to nearest, in groups of ``GROUP_SIZE``. One that is quantized already stays as it is.

    A head that shares its weight with the embedding gets one of its own; the embedding stays.

    Raises:
        ConfigError: the model has no linear head, or it is offloaded, or no such bits.
    """
    if bits not in BITS:
        raise ConfigError(f"quantize_head={bits!r}, expected one of {BITS}, or None to leave the head as it is")
    head = model.get_output_embeddings()
    if isinstance(head, QuantLinear | TiedHead):
        return
    if not isinstance(head, nn.Linear):
        raise ConfigError(
            f"quantize_head={bits}, but {type(model).__name__} has no linear output embedding; leave it out"
        )
    if head.weight.is_meta:
        raise ConfigError(
            f"quantize_head={bits}, but the output embedding is offloaded; load it to a device, or leave it"
        )
    name = next(name for name, module in model.named_modules() if module is head)
    size = GROUP_SIZE if head.in_features % GROUP_SIZE == 0 else -1
    config = QuantizeConfig(bits=bits, group_size=size, quality="fast")
    weight = round_to_nearest(head.weight.detach(), config)
    settings = model.config.quantization_config
    known = settings.to_quantize_config()
    spelling = known.checkpoint_format, getattr(torch, known.pack_dtype)  # one for the whole checkpoint
    bias = None if head.bias is None else head.bias.detach()
    rounded = QuantLinear.from_weight(weight, bias, *spelling, name=name, dtype=head.weight.dtype)
    with keeping_hooks(model):
        replace_module(model, name, rounded)
    untie_quantized(model)
    settings.lm_head = True
    rule = {key: getattr(config, key) for key in ("bits", "group_size", "sym", "desc_act")}
    others = known.for_module(name)
    if others is None or rule != {key: getattr(others, key) for key in rule}:  # what a reader of the saved model needs
        settings.dynamic = {f"+:^{re.escape(name)}$": rule, **(getattr(settings, "dynamic", None) or {})}
