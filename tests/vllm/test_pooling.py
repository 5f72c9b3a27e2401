"""Embedding models and classifiers, ``LLM(runner="pooling")``: what the dequantized weights give in transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from torch import Tensor

import gptq_transformers
from gptq_backend import QuantizeConfig
from tests.transformers.checkpoints import VOCABULARY, dense, ids
from tests.transformers.test_auto_calibration import tokenizer
from tests.vllm.engine import Engine

SIZES = {"vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_labels": 3}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 32, "max_position_embeddings": 128}
CONFIGS = {
    "Qwen3": {**HEADS, "pad_token_id": 0},
    "Llama": {**HEADS, "pad_token_id": 0},
    "Bert": {"num_attention_heads": 2, "max_position_embeddings": 128},
    "ModernBert": {"num_attention_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0, "sep_token_id": 2},
}
CONFIGS["ModernBert"] |= {"cls_token_id": 1, "bos_token_id": 1, "eos_token_id": 2, "classifier_pooling": "mean"}


def quantized(folder: Path, name: str, kind: str) -> torch.nn.Module:
    """Write a quantized model of class ``name + kind`` -> the dequantized one."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(**SIZES, **CONFIGS[name])
    model = getattr(transformers, f"{name}{kind}")(config).eval()
    gptq_transformers.quantize(model, QuantizeConfig(group_size=32, desc_act=True, sym=False), list(ids(64)))
    model.save_pretrained(folder)
    return dense(model)


def check(found: Tensor, expected: Tensor) -> None:
    assert found.shape == expected.shape
    error = float((found - expected).norm() / expected.norm())
    print(f"{error:.5f}")
    assert error < 1e-3


slow = pytest.mark.slow


@pytest.mark.parametrize(
    "name", ["Qwen3", "Bert", pytest.param("Llama", marks=slow), pytest.param("ModernBert", marks=slow)]
)
@torch.no_grad()
def test_an_embedding_is_that_of_the_dequantized_model(engine: Engine, name: str, tmp_path: Path) -> None:
    hidden = quantized(tmp_path, name, "Model")(ids()[:1]).last_hidden_state[0]
    tokenizer().save_pretrained(tmp_path)  # vLLM makes no embedding without one, even of token ids
    found = engine.pooled(tmp_path, ids()[0], "embed", dtype="float32", skip_tokenizer_init=False)
    check(found, torch.nn.functional.normalize(hidden[0 if "Bert" in name else -1], dim=-1))


@pytest.mark.parametrize(
    "name", ["Qwen3", *(pytest.param(name, marks=slow) for name in ("Llama", "Bert", "ModernBert"))]
)
@torch.no_grad()
def test_a_class_is_that_of_the_dequantized_model(engine: Engine, name: str, tmp_path: Path) -> None:
    logits = quantized(tmp_path, name, "ForSequenceClassification")(ids()[:1]).logits[0]
    check(engine.pooled(tmp_path, ids()[0], "classify", dtype="float32"), logits.softmax(-1))
