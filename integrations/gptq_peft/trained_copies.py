"""``modules_to_save``: what is trained as a whole, beside the adapters, is a dense copy of the quantized layers."""

from __future__ import annotations

import copy

from torch import nn

from gptq_backend import QuantLinear, TiedHead
from gptq_backend.model import replace_module


def dense_copy(module: nn.Module) -> nn.Module:
    """A copy of ``module`` in which quantized layers are dense, in the dtype that dense ones would have."""
    if isinstance(module, QuantLinear):
        return module.dequantize(module.compute_dtype)
    if isinstance(module, TiedHead):
        embedding = module.embedding
        return module.dequantize(embedding.dequantize(embedding.compute_dtype).weight)
    dense = copy.deepcopy(module)
    for name, layer in [*dense.named_modules()]:
        if isinstance(layer, QuantLinear):
            replace_module(dense, name, layer.dequantize(layer.compute_dtype))
    return dense
