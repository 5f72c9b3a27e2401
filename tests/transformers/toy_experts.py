"""Small mixtures of experts with random weights, of every kind that transformers builds in its own way."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import gptq_transformers
from gptq_backend import QuantizeConfig
from gptq_transformers.experts.expert_list import ExpertList

FUSED = int(transformers.__version__.split(".")[0]) >= 5
needs_fused = pytest.mark.skipif(not FUSED, reason="transformers 4 keeps the experts of these models apart")

TINY = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "pad_token_id": 0,
}
LATENT = {"q_lora_rank": 32, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 16}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "moe_intermediate_size": 48}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": {"num_experts": 4, "moe_intermediate_size": 48},
    "phimoe": {"num_local_experts": 4},  # w1, w2, w3 and a renamed router
    "gpt_oss": {
        "num_local_experts": 4,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4},
    },  # interleaved, biased
    "granitemoe": {"num_local_experts": 4},  # 3-D in the file too
    "deepseek_v3": {**GROUPS, **LATENT, "first_k_dense_replace": 1, "head_dim": 8},  # shared experts beside the routed
    "nemotron_h": {
        **GROUPS,
        "layers_block_type": ["attention", "moe"],
        "moe_shared_expert_intermediate_size": 48,
    },  # no gate
}
APART_IN_4 = [
    "mixtral",
    "qwen3_moe",
    "phimoe",
]  # the others fuse their experts in ways of their own there, or do not exist
PROJECTIONS = {
    "mixtral": ["w1", "w3", "w2"],
    "phimoe": ["w1", "w3", "w2"],
    "nemotron_h": ["up_proj", "down_proj"],
}


def build(name: str, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    try:
        config = AutoConfig.for_model(name, **{**TINY, **MODELS[name], **changes})
    except ValueError:
        pytest.skip(f"this transformers has no {name}")
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
    if FUSED:
        model.set_experts_implementation("eager")
    return model.to(dtype)


def ids(batch: int = 2, length: int = 13) -> Tensor:
    return torch.randint(3, 128, (batch, length), generator=torch.Generator().manual_seed(3))


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    return model(ids()).logits


def expert_lists(model: nn.Module) -> dict[str, ExpertList]:
    return {name: module for name, module in model.named_modules() if isinstance(module, ExpertList)}


def keys(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return list(file.keys())


def quantized(name: str, folder: Path, **settings: Any) -> Tensor:
    model = build(name)
    settings = {"bits": 4, "group_size": 16, **settings}
    gptq_transformers.quantize(model, QuantizeConfig(**settings), list(ids(6, 20)))
    model.save_pretrained(folder)
    return logits(model)


def check_dequantized(model: Any, folder: Path) -> None:
    """Dequantizes ``model``; saved, it is what plain transformers finds all of."""
    expected = logits(model)
    dense = model.dequantize()
    assert not expert_lists(dense)
    torch.testing.assert_close(logits(dense), expected, rtol=1e-4, atol=1e-4)
    dense.save_pretrained(folder)
    again, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not any(info.values()), info
    assert type(again) is type(dense)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
