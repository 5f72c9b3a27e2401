"""Small models of many classes, as folders that transformers writes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import (
    BartConfig,
    BertConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PretrainedConfig,
    Qwen3Config,
    Wav2Vec2Config,
)

from gptq_backend import QuantizeConfig

CONFIG = QuantizeConfig(bits=8, group_size=32, quality="fast")
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
HEADS: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
SIDES = {"layers": 2, "attention_heads": 4, "ffn_dim": 96}
BART = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in SIDES.items()}
VISION = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
SOUND = {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}


def qwen3() -> PretrainedConfig:
    return Qwen3Config(**HEADS, num_labels=3)


def bert() -> PretrainedConfig:
    return BertConfig(**SIZES, num_labels=3)


def bart() -> PretrainedConfig:
    return BartConfig(vocab_size=128, d_model=64, max_position_embeddings=64, **BART)


def llava() -> PretrainedConfig:
    vision = CLIPVisionConfig(num_hidden_layers=3, **VISION)  # heavier than the language model
    text = LlamaConfig(**HEADS)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=127, vision_feature_layer=-1)


def sound() -> PretrainedConfig:
    return Wav2Vec2Config(**{**SIZES, "vocab_size": 32}, **SOUND)


KINDS = {
    "Qwen3ForCausalLM": (qwen3, 14),
    "Qwen3ForSequenceClassification": (qwen3, 14),
    "Qwen3ForTokenClassification": (qwen3, 14),
    "Qwen3ForQuestionAnswering": (qwen3, 14),
    "Qwen3Model": (qwen3, 14),
    "BertForMaskedLM": (bert, 12),
    "BertForSequenceClassification": (bert, 12),
    "BertForPreTraining": (bert, 12),
    "BertLMHeadModel": (bert, 12),
    "BertModel": (bert, 12),
    "LlavaForConditionalGeneration": (llava, 14),
}


def save(folder: Path, name: str, config: PretrainedConfig) -> Path:
    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def samples() -> list[torch.Tensor]:
    return list(torch.randint(3, 120, (8, 24), generator=torch.Generator().manual_seed(1)))


def everything(output: Any) -> torch.Tensor:
    """All floats that a model returns for a batch, but for what only serves to go on."""
    parts = [value for value in output.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return torch.cat([part.flatten() for part in parts])
