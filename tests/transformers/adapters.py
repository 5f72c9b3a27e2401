"""Adapters for the tests: folders as peft writes them, trained on nothing, but large enough to matter."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gptq_backend import QuantLinear


def write_lora(
    folder: Path, model: nn.Module, layers: Sequence[str], rank: int = 4, scale: float = 0.005, **settings: Any
) -> dict[str, Tensor]:
    """Write a LoRA of rank ``rank`` on ``layers`` of ``model`` to ``folder`` by hand -> what it adds to each weight."""
    generator = torch.Generator().manual_seed(0)
    tensors, deltas = {}, {}
    for name in layers:
        layer: Any = model.get_submodule(name)
        down = torch.randn(rank, layer.in_features, generator=generator)
        up = torch.randn(layer.out_features, rank, generator=generator) * scale
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
        factor = rank**-0.5 if settings.get("use_rslora") else 1 / rank
        deltas[name] = 2 * rank * factor * up @ down
    targets = sorted({name.rpartition(".")[2] for name in layers})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": targets, "bias": "none"}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "adapter_config.json").write_text(json.dumps(config | settings))
    save_file(tensors, folder / "adapter_model.safetensors")
    return deltas


def dense_twin(model: nn.Module) -> nn.Module:
    """A copy of ``model`` in float32 with ordinary layers in the places of the quantized ones."""
    twin = copy.deepcopy(model).float()
    for name, module in list(twin.named_modules()):
        if isinstance(module, QuantLinear):
            parent, _, child = name.rpartition(".")
            setattr(twin.get_submodule(parent), child, module.dequantize())
    return twin
