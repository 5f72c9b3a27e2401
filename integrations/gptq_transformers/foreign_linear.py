"""A layer in another tool's layout, between transformers' weight loader and the quantized layer that is made of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend import ConfigError, QuantLinear
from gptq_backend.format import ForeignLayer, TensorFile, read_tensor
from gptq_backend.model import replace_module

from .dispatch import keeping_hooks


class ForeignLinear(nn.Module):
    """Empty parameters on meta, called and shaped as in the file, for the loader to fill.

    Args:
        layer: the layer that will take its place, on meta.
        stored: what lies in the files.
    """

    def __init__(self, layer: Any, stored: TensorFile) -> None:
        super().__init__()
        assert isinstance(layer, QuantLinear)
        assert isinstance(stored, ForeignLayer)
        self._made, self.stored = [layer], stored  # in a list, that it be no child
        for part, info in stored.parts.items():
            empty = torch.empty(info.shape, dtype=info.dtype, device="meta")
            self.register_parameter(part, nn.Parameter(empty, requires_grad=False))
        self.register_parameter("bias", layer.bias)

    def quant_linear(self) -> QuantLinear:
        """The layer with the values that were loaded.

        Raises:
            CheckpointError: they are damaged. ConfigError: they are offloaded.
        """
        (layer,) = self._made
        tensors: dict[str, Tensor] = {part: self._value(part) for part in self.stored.parts}
        device = getattr(self, next(iter(tensors))).device
        made = {part: tensor.to(device) for part, tensor in self.stored.translate(tensors).items()}
        bias: Any = self.bias
        layer.hold(made if bias is None else {**made, "bias": bias.data})
        return layer

    def _value(self, part: str) -> Tensor:
        """On the CPU, in the dtype of the file: transformers 4 casts to the model's, which cannot be undone."""
        parameter: nn.Parameter = getattr(self, part)
        if parameter.is_meta:
            raise ConfigError(
                f"{self.stored.name}: its weights are offloaded, which layers in the layout of "
                f"{self.stored.layout.name} cannot be; load the model without offloading, or convert it first "
                "(gptq-backend convert)"
            )
        info = self.stored.parts[part]
        return parameter.data.cpu() if parameter.dtype == info.dtype else read_tensor(info)


def translate_layers(model: nn.Module) -> None:
    """Put quantized layers in the place of all :class:`ForeignLinear`, one at a time."""
    with keeping_hooks(model):
        for name, module in [*model.named_modules()]:
            if isinstance(module, ForeignLinear):
                replace_module(model, name, module.quant_linear())
