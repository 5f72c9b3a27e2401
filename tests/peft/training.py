"""A few steps of training on one batch, and what a saved adapter holds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor, nn

from gptq_backend import QuantLinear
from tests.transformers.checkpoints import VERSION_4, ids, load

TARGETS = ["q_proj", "v_proj", "down_proj"]
# A mixture: the arguments of the fixture "checkpoint", and the names of an expert's layers in its files.
EXPERTS: tuple[str, dict[str, int], list[str]] = (
    "qwen3_moe",
    {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
    ["gate_proj", "up_proj", "down_proj"],
)
if VERSION_4:
    EXPERTS = ("mixtral", {}, ["w1", "w2", "w3"])


def train(model: nn.Module, steps: int = 6, rate: float = 1e-2) -> float:
    """By how much these steps lower the loss; the model is in eval mode afterwards."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer, before = torch.optim.AdamW(trained, lr=rate), loss_of(model)
    model.train()
    for _ in range(steps):
        model(input_ids=ids(), labels=ids()).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return before - loss_of(model)


@torch.no_grad()
def loss_of(model: nn.Module) -> float:
    """Of the same batch, in eval mode."""
    return float(model.eval()(input_ids=ids(), labels=ids()).loss)


def reloaded(model: PeftModel, base: Path, folder: Path, **kwargs: Any) -> PeftModel:
    """``model``'s adapter, saved and put onto a fresh base."""
    model.save_pretrained(folder)
    return PeftModel.from_pretrained(load(base, **kwargs), folder).eval()


def saved_tensors(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def quantized(model: nn.Module) -> list[QuantLinear]:
    return [module for module in model.modules() if isinstance(module, QuantLinear)]
