"""``merge_and_unload()`` makes dense layers where adapters were, and nothing is lost on the way."""

from __future__ import annotations

import copy
import gc
import json
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

from gptq_backend import ConfigError, QuantLinear
from tests.peft.training import TARGETS, quantized, train
from tests.transformers.checkpoints import distance, load, logits


def trained(folder: Path, targets: object = TARGETS, **kwargs: object) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=8, target_modules=targets, task_type="CAUSAL_LM")
    model = get_peft_model(load(folder, **kwargs), config)
    train(model)
    return model


def test_layers_under_adapters_become_dense_and_the_others_stay(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = trained(checkpoint())
    expected, stored = logits(model), model.base_model.model.model.layers[0].mlp.up_proj.state_dict()
    merged = model.merge_and_unload()
    block = merged.model.layers[0]
    assert [type(layer) for layer in (block.self_attn.q_proj, block.mlp.down_proj)] == [nn.Linear, nn.Linear]
    assert all(torch.equal(value, stored[key]) for key, value in block.mlp.up_proj.state_dict().items())
    assert isinstance(block.mlp.up_proj, QuantLinear)
    assert not any(parameter.requires_grad for parameter in merged.parameters())
    merged.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert distance(logits(again), expected) < 1e-5
    assert len(quantized(again)) == len(quantized(merged)) == 8


def test_a_model_without_quantized_layers_is_an_ordinary_one(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = trained(checkpoint(), "all-linear")
    expected = logits(model)
    merged = model.merge_and_unload()
    assert distance(logits(merged), expected) < 1e-5
    assert not merged.is_quantized
    assert not hasattr(merged, "hf_quantizer")
    merged.save_pretrained(tmp_path)
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    again = load(tmp_path)
    assert not quantized(again)
    assert distance(logits(again), expected) < 1e-5


def test_the_sum_is_rounded_once(checkpoint: Callable[..., Path]) -> None:
    model = trained(checkpoint(), dtype=torch.bfloat16)
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    exact = layer.base_layer.dequantize(torch.float64).weight + layer.get_delta_weight("default").double()
    merged = model.merge_and_unload().model.layers[0].self_attn.q_proj.weight
    assert torch.equal(merged, exact.float().to(torch.bfloat16))


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_dequantized_model_merges_as_any_other(when: str, checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = trained(checkpoint())
    expected = logits(model)
    if when == "before":
        model.save_pretrained(tmp_path)
        base = load(checkpoint())
        base.dequantize()
        model = PeftModel.from_pretrained(base, tmp_path)
    else:
        model.base_model.model.dequantize()
        assert not any(p.requires_grad for name, p in model.named_parameters() if "lora_" not in name)
        assert distance(logits(model), expected) < 1e-5
    assert not quantized(model)
    assert distance(logits(model.merge_and_unload()), expected) < 1e-5


def test_merging_checks_for_nan_where_it_is_asked_to(checkpoint: Callable[..., Path]) -> None:
    model = trained(checkpoint())
    expected = logits(model)
    assert distance(logits(copy.deepcopy(model).merge_and_unload(safe_merge=True)), expected) < 1e-5
    model.base_model.model.model.layers[0].self_attn.q_proj.lora_B["default"].weight.data[0] = float("nan")
    with pytest.raises(ValueError, match="NaN"):
        model.merge_and_unload(safe_merge=True)


def test_merging_in_place_is_refused_in_one_sentence(checkpoint: Callable[..., Path]) -> None:
    model = trained(checkpoint())
    expected = logits(model)
    with pytest.raises(ConfigError, match=r"q_proj, which is quantized to 4 bits; use merge_and_unload\(\)"):
        model.merge_adapter()
    with pytest.raises(ConfigError, match="cannot be written to"):
        model.base_model.model.model.layers[0].self_attn.q_proj.merge()
    assert torch.equal(logits(model), expected)


def test_merging_into_offloaded_layers_is_refused(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    on_cpu = ("model.embed_tokens", "model.layers.0", "model.norm", "model.rotary_emb", "lm_head")
    places = {"model.layers.1": "disk", **dict.fromkeys(on_cpu, "cpu")}
    base = load(checkpoint(), device_map=places, offload_folder=tmp_path)
    model = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    with pytest.raises(ConfigError, match=r"layers.1.self_attn.q_proj: its weights are offloaded"):
        model.merge_and_unload()
    assert len(quantized(model)) == 14


def test_packed_weights_are_freed_as_they_are_merged(checkpoint: Callable[..., Path]) -> None:
    model = trained(checkpoint())
    logits(model)
    layer = weakref.ref(model.base_model.model.model.layers[0].self_attn.q_proj.base_layer)
    merged = model.merge_and_unload()
    del model
    gc.collect()
    assert layer() is None
    assert merged is not None


def test_a_saved_adapter_serves_another_quantization_of_the_model(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    model = trained(checkpoint(bits=4))
    model.save_pretrained(tmp_path)
    other = PeftModel.from_pretrained(load(checkpoint(bits=8)), tmp_path).eval()
    assert distance(logits(other), logits(model)) < 0.5
