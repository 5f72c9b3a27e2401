"""A LoRA adapter on top of a quantized model adds exactly its product."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from gptq_backend import QuantizeConfig
from tests.transformers.checkpoints import dense, ids, load, logits, tiny, write
from tests.vllm.engine import Engine
from tests.vllm.test_offline import BOUND, distance

RANK, ALPHA = 8, 16
LAYERS = {"self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"), "mlp": ("gate_proj", "up_proj", "down_proj")}


def adapter(folder: Path, model: nn.Module, parents: tuple[str, ...]) -> nn.Module:
    """Write a random adapter for the layers of ``parents``; ``model`` with the adapter added to its weights."""
    merged, tensors = dense(model), {}
    for name, layer in merged.named_modules():
        parent, _, child = name.rpartition(".")
        if child in LAYERS.get(parent.rpartition(".")[2], ()) and parent.endswith(parents):
            down = torch.randn(RANK, layer.in_features) / layer.in_features**0.5
            up = torch.randn(layer.out_features, RANK) / 40
            layer.weight.data += ALPHA / RANK * up @ down
            tensors[f"base_model.model.{name}.lora_A.weight"] = down
            tensors[f"base_model.model.{name}.lora_B.weight"] = up
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = sorted({name.split(".")[-3] for name in tensors})
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules, "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return merged


SETTINGS = {
    "act-order": {"group_size": 32, "desc_act": True},
    "mixed bits and a dense shard": {"group_size": 32, "dynamic": {"-:.*v_proj": {}, ".*(k|up)_proj": {"bits": 8}}},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_an_adapter_adds_its_product(engine: Engine, case: str, tmp_path: Path) -> None:
    plain: Tensor = write(tmp_path / "model", tiny(), QuantizeConfig(**SETTINGS[case]))[0]
    merged = adapter(tmp_path / "adapter", load(tmp_path / "model"), ("self_attn", "mlp"))
    expected = logits(merged)[0]
    options = {"enable_lora": True, "max_lora_rank": RANK}
    found = engine.logprobs(tmp_path / "model", ids()[0], lora=tmp_path / "adapter", **options)
    assert distance(found, expected) < BOUND < distance(found, plain)
    assert distance(engine.logprobs(tmp_path / "model", ids()[0], **options), plain) < BOUND
