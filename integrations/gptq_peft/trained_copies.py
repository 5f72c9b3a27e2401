"""``modules_to_save``: what is trained as a whole, beside the adapters, is a dense copy of the quantized layer."""

from __future__ import annotations

import copy
from typing import Any

from torch import nn

from gptq_backend import QuantLinear
from gptq_backend.model import replace_module


def put_dense_copy(original: Any, wrapper: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """Around ``ModulesToSaveWrapper.update``: peft's own copy would have packed integers, which have no gradients."""
    module = wrapper.original_module
    quantized = any(isinstance(each, QuantLinear) for each in module.modules())
    if quantized and adapter_name not in wrapper.modules_to_save:
        wrapper.modules_to_save[adapter_name] = _dense_copy(module)
    original(wrapper, adapter_name, *args, **kwargs)


def _dense_copy(module: nn.Module) -> nn.Module:
    if isinstance(module, QuantLinear):
        return module.dequantize(module.compute_dtype)
    dense = copy.deepcopy(module)
    for name, layer in [*dense.named_modules()]:
        if isinstance(layer, QuantLinear):
            replace_module(dense, name, layer.dequantize(layer.compute_dtype))
    return dense
