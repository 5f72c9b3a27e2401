"""Vision-language models of which the language model is quantized and the vision tower is not, given text."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForImageTextToText

from gptq_backend import QuantizeConfig
from tests.transformers.checkpoints import SIZES, VOCABULARY, ids, write
from tests.vllm.engine import Engine
from tests.vllm.test_architectures import DELTA, EXPERTS, SHARED
from tests.vllm.test_offline import BOUND, distance

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("torchvision") is None, reason="vLLM's classes import torchvision"),
]

TEXT: dict[str, Any] = {**SIZES, "vocab_size": VOCABULARY + 8}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 6, 6], "partial_rotary_factor": 1.0}
SPATIAL = {**TEXT, "rope_parameters": ROPE}
IMAGE = VOCABULARY
IDS = dict(
    zip(("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id"), range(IMAGE, IMAGE + 4))
)
TOWER = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 2}
TOWER |= {"image_size": 28, "patch_size": 14}
QWEN = {"depth": 2, "hidden_size": 64, "intermediate_size": 96, "num_heads": 2, "out_hidden_size": 64, "patch_size": 14}
QWEN3 = {**QWEN, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
MODELS: dict[str, dict[str, Any]] = {
    "gemma3": {
        "text_config": TEXT,
        "vision_config": TOWER,
        "mm_tokens_per_image": 4,
        "image_token_index": IMAGE,
        "boi_token_index": IMAGE + 1,
        "eoi_token_index": IMAGE + 2,
    },
    "qwen2_vl": {"text_config": SPATIAL, "vision_config": {**QWEN, "embed_dim": 64, "mlp_ratio": 2}, **IDS},
    "qwen2_5_vl": {"text_config": SPATIAL, "vision_config": {**QWEN, "fullatt_block_indexes": [1]}, **IDS},
    "qwen3_vl": {"text_config": SPATIAL, "vision_config": QWEN3, **IDS},
    "qwen3_5": {"text_config": {**SPATIAL, **DELTA}, "vision_config": QWEN3 | {"deepstack_visual_indexes": []}, **IDS},
    "qwen3_5_moe": {
        "text_config": {**SPATIAL, **DELTA, **EXPERTS, **SHARED},
        **IDS,
        "vision_config": QWEN3 | {"deepstack_visual_indexes": []},
    },
    "llava": {
        "text_config": {**TEXT, "model_type": "llama"},
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
        "vision_config": {**TOWER, "model_type": "clip_vision_model"},
    },
    "mistral3": {
        "text_config": {**TEXT, "model_type": "mistral"},
        "image_token_index": IMAGE,
        "vision_feature_layer": -1,
        "vision_config": {**TOWER, "model_type": "pixtral", "head_dim": 32},
    },
}


@pytest.mark.parametrize("model_type", MODELS)
def test_text_gives_the_right_logprobs(engine: Engine, model_type: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(AutoConfig.for_model(model_type, **MODELS[model_type])).eval()
    expected = write(tmp_path, model, QuantizeConfig(group_size=32, desc_act=True, sym=False))[0]
    value = distance(engine.logprobs(tmp_path, ids()[0], language_model_only=True), expected)
    print(f"{model_type}: {value:.4f}")
    assert value < BOUND / 4
