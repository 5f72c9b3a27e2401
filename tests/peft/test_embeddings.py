"""Adapters on a model whose embeddings are quantized: they stay as they are, unless something of them is trained."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PrefixTuningConfig, PromptTuningConfig, TrainableTokensConfig, get_peft_model
from torch import nn

from gptq_backend import QuantEmbedding, QuantizeConfig, TiedHead
from gptq_transformers import quantize
from tests.peft.training import TARGETS, reloaded, train
from tests.transformers.checkpoints import distance, ids, load, logits, tiny


@pytest.fixture(scope="module", params=["tied", "own head"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    model = tiny(tie_word_embeddings=request.param == "tied")
    quantize(model, QuantizeConfig(bits=4, group_size=32, embed_bits=8, quality="fast"), None)
    model.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("targets", [TARGETS, "all-linear"], ids=["named", "all-linear"])
def test_adapters_are_trained_and_embeddings_stay(folder: Path, tmp_path: Path, targets: list[str] | str) -> None:
    model = get_peft_model(load(folder), LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    before = {key: value.clone() for key, value in model.state_dict().items() if "embed_tokens" in key}
    assert not any("lora" in name for name, _ in model.named_parameters() if "embed_tokens" in name or "head" in name)
    assert train(model) > 0
    after = model.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert torch.equal(logits(reloaded(model, folder, tmp_path)), logits(model))
    assert isinstance(model.get_base_model().get_input_embeddings(), QuantEmbedding)


def test_gradients_reach_the_first_block_with_checkpointing(folder: Path) -> None:
    base = load(folder)
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    model = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    assert train(model) > 0


def test_merging_keeps_the_embeddings_quantized(folder: Path) -> None:
    model = get_peft_model(load(folder), LoraConfig(r=4, target_modules=TARGETS, task_type="CAUSAL_LM"))
    train(model)
    expected = logits(model)
    merged = model.merge_and_unload()
    assert isinstance(merged.get_input_embeddings(), QuantEmbedding)
    assert distance(logits(merged), expected) < 2e-3


@pytest.mark.parametrize("name", ["embed_tokens", "lm_head"])
def test_an_embedding_that_is_trained_as_a_whole_is_a_dense_copy(folder: Path, name: str) -> None:
    base = load(folder)
    tied = isinstance(base.get_output_embeddings(), TiedHead)
    options = {"modules_to_save": [name], "task_type": "CAUSAL_LM"}
    model = get_peft_model(base, LoraConfig(r=4, target_modules=TARGETS, **options))
    copies = [m for key, m in model.named_modules() if f"{name}.modules_to_save.default" in key]
    assert [type(each) for each in copies] == [nn.Embedding if name == "embed_tokens" else nn.Linear], tied
    assert copies[0].weight.requires_grad
    assert train(model) > 0


TOKENS = ids()[0, :2].tolist()
CHANGING = [
    LoraConfig(r=4, target_modules=["embed_tokens", "q_proj"]),
    LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=TOKENS),
    TrainableTokensConfig(target_modules=["embed_tokens"], token_indices=TOKENS),
]


@pytest.mark.parametrize("config", CHANGING, ids=["LoRA", "tokens beside LoRA", "tokens"])
def test_an_adapter_that_changes_rows_makes_the_embedding_dense(
    folder: Path, tmp_path: Path, config: LoraConfig, caplog: pytest.LogCaptureFixture
) -> None:
    base = load(folder)
    tied = isinstance(base.get_output_embeddings(), TiedHead)
    model = get_peft_model(base, copy.deepcopy(config))
    assert "model.embed_tokens is quantized, and an adapter changes its rows: it was dequantized" in caplog.text
    assert train(model) > 0
    expected = logits(model)
    assert torch.equal(logits(reloaded(model, folder, tmp_path)), expected)
    merged = model.merge_and_unload()
    assert type(merged.get_input_embeddings()) is nn.Embedding
    if not tied or config.peft_type != "LORA" or config.trainable_token_indices:  # of LoRA, peft leaves out the head
        assert distance(logits(merged), expected) < 2e-3
    assert (merged.get_output_embeddings().weight is merged.get_input_embeddings().weight) == tied


def test_an_adapter_on_a_tied_head(folder: Path, tmp_path: Path) -> None:
    base = load(folder)
    tied = isinstance(base.get_output_embeddings(), TiedHead)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["lm_head"]))
    assert train(model) > 0
    assert isinstance(base.get_input_embeddings(), QuantEmbedding) != tied
    assert torch.equal(logits(reloaded(model, folder, tmp_path)), logits(model))


@pytest.mark.parametrize("kind", [PromptTuningConfig, PrefixTuningConfig])
def test_prompts_are_put_before_tokens(folder: Path, tmp_path: Path, kind: type) -> None:
    config = kind(task_type="CAUSAL_LM", num_virtual_tokens=4)
    model = get_peft_model(load(folder), config)
    assert isinstance(model.get_base_model().get_input_embeddings(), QuantEmbedding)
    assert not any(name.endswith("embed_tokens.weight") for name, _ in model.named_parameters())
    assert train(model) > 0
    assert torch.equal(logits(reloaded(model, folder, tmp_path)), logits(model))
