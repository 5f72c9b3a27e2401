"""The models that a merged checkpoint is compared with: its base with the adapter on top, and plainly rounded."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from gptq_backend import QuantLinear
from gptq_backend.algorithm import quantize_weight
from gptq_backend.model import replace_module

from .adapter import Adapter
from .base import Base
from .calibrated import fill_dense, open_model


def with_adapter(
    model: str | Path, adapter: str | Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The base model with the adapter on top: each changed layer is dense, with its exact weight in ``dtype``.

    Args:
        model, adapter: as for :func:`merge_adapter`.
    """

    def dense(weight: Tensor, bias: Tensor | None, _: QuantLinear) -> nn.Module:
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        linear.weight = nn.Parameter(weight.to(dtype), requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.to(dtype), requires_grad=False)
        return linear

    return _replaced(model, adapter, dtype, trust_remote_code, dense)


def plainly_rounded(
    model: str | Path, adapter: str | Path, dtype: torch.dtype = torch.float32, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The same with each changed layer rounded to nearest on a new grid, as a tool without calibration does it."""
    base = Base(model)

    def rounded(weight: Tensor, bias: Tensor | None, layer: QuantLinear) -> nn.Module:
        config = base.config.for_module(layer.name) or base.config
        found = quantize_weight(weight, None, config, name=layer.name).weight
        return QuantLinear.from_weight(found, bias, name=layer.name, dtype=dtype)

    return _replaced(model, adapter, dtype, trust_remote_code, rounded)


def _replaced(
    model: str | Path,
    adapter: str | Path,
    dtype: torch.dtype,
    trust_remote_code: bool,
    make: Callable[[Tensor, Tensor | None, QuantLinear], nn.Module],
) -> PreTrainedModel:
    base = Base(model)
    learned = Adapter(Path(adapter), base.manifest, base.shapes)
    layers = base.touched(learned)
    loaded = open_model(base, layers, trust_remote_code, dtype)
    for name in layers:
        old: Any = loaded.get_submodule(name)
        replace_module(loaded, name, make(*base.merged(name, learned), old))
    fill_dense(loaded, base, learned, layers)
    return loaded.eval()
