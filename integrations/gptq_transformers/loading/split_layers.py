"""Layers that the model has in one and the checkpoint in parts: Phi-3's ``gate_up_proj`` as ``gate_proj`` and
``up_proj``, say, which GPTQModel quantizes apart.

The parts are put where the checkpoint has them, each with a spec of its own (one may be dense), so that saving writes
the names that loading found. In the place of the model's layer is a :class:`JoinedParts`.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend.model import is_linear, replace_module

# Parts of equal size, in the order of the rows.
_PARTS = {"gate_up_proj": ("gate_proj", "up_proj")}
_OTHER_ORDER = {"Phi4MultimodalAudioMLP": ("up_proj", "gate_proj")}


class JoinedParts(nn.Module):
    """``y = cat(part(x) for each part)`` in the place of one linear layer.

    Args:
        parent: the module that holds the parts. It is looked at on every call, since a part may be replaced.
        parts: their names in it.
    """

    def __init__(self, parent: nn.Module, parts: tuple[str, ...]) -> None:
        super().__init__()
        self.parts = parts
        self._parent = [parent]  # in a list it is no child

    def forward(self, x: Tensor) -> Tensor:
        """x: [..., K] -> [..., sum of the parts' N]."""
        (parent,) = self._parent
        return torch.cat([getattr(parent, part)(x) for part in self.parts], -1)

    def extra_repr(self) -> str:
        """What :func:`print` shows."""
        return ", ".join(self.parts)


def split_layers(model: nn.Module, layers: Collection[str]) -> list[str]:
    """Prepare ``model``, still without weights, for a checkpoint that has some layers in parts.

    ``layers`` are all of the checkpoint's, called as the model would call them.

    Returns:
        Names of the replaced layers.
    """
    layers, found = set(layers), {}
    for name, module in model.named_modules():
        place, _, called = name.rpartition(".")
        if called not in _PARTS or name in layers or not is_linear(module):
            continue
        parent = model.get_submodule(place)
        parts = _OTHER_ORDER.get(type(parent).__name__, _PARTS[called])
        if all(f"{place}.{part}" in layers and not hasattr(parent, part) for part in parts):
            found[name] = (parent, parts, module)
    for name, (parent, parts, module) in found.items():
        rows, columns = module.weight.shape
        for part in parts:
            layer = nn.Linear(columns, rows // len(parts), module.bias is not None, device="meta")
            parent.add_module(part, layer.to(module.weight.dtype))
        replace_module(model, name, JoinedParts(parent, parts))
    return list(found)


def join_layers(model: nn.Module) -> None:
    """Undo :func:`split_layers` where all parts are dense again, so that the model has its own names."""
    for name, module in list(model.named_modules()):
        if not isinstance(module, JoinedParts):
            continue
        (parent,) = module._parent
        parts: list[Any] = [parent.get_submodule(part) for part in module.parts]
        if any(type(part) is not nn.Linear for part in parts):
            continue
        weight = torch.cat([part.weight.detach() for part in parts])
        biases = [part.bias for part in parts]
        joined = nn.Linear(weight.shape[1], weight.shape[0], biases[0] is not None, device="meta")
        joined.weight = nn.Parameter(weight)
        if biases[0] is not None:
            joined.bias = nn.Parameter(torch.cat([bias.detach() for bias in biases]))
        for part in module.parts:
            delattr(parent, part)
        replace_module(model, name, joined)
