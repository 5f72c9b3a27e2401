"""Experts modules: the split ones must compute the same, and their names must survive loading and saving."""

from __future__ import annotations

import copy
import pickle
import weakref
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import gptq_transformers
from gptq_backend import QuantizeConfig, QuantLinear
from gptq_transformers.experts.conversions import drop_fused_conversions
from gptq_transformers.experts.unfuse import replace_fused_experts, unfuse_experts
from tests.transformers.toy_experts import (
    APART_IN_4,
    FUSED,
    MODELS,
    PROJECTIONS,
    TINY,
    build,
    check_dequantized,
    expert_lists,
    ids,
    keys,
    logits,
    needs_fused,
    quantized,
)

# -- splitting in memory -------------------------------------------------------------------------------------------


@needs_fused
@pytest.mark.parametrize("name", MODELS)
def test_split_experts_compute_what_the_fused_ones_did(name: str) -> None:
    model = build(name)
    expected = logits(model)
    replaced = unfuse_experts(model)
    assert replaced == list(expert_lists(model))
    assert replaced
    torch.testing.assert_close(logits(model), expected, atol=2e-6, rtol=1e-5)
    for experts in expert_lists(model).values():
        wanted = PROJECTIONS.get(name, ["gate_proj", "up_proj", "down_proj"])
        assert [child for child, _ in experts.get_submodule("3").named_children()] == wanted
        assert all(type(linear) is nn.Linear for linear in experts.get_submodule("3").children())
        assert all(linear.weight.is_contiguous() for linear in experts.get_submodule("0").children())


@needs_fused
def test_split_experts_agree_in_bfloat16() -> None:
    model = build("qwen3_moe", torch.bfloat16)
    expected = logits(model)
    unfuse_experts(model)
    assert logits(model).dtype == torch.bfloat16
    torch.testing.assert_close(logits(model), expected, atol=0.02, rtol=0.02)


@needs_fused
def test_fused_weights_are_freed_and_no_storage_is_shared() -> None:
    model = build("mixtral")
    experts = model.model.layers[0].mlp.experts
    fused = weakref.ref(experts.gate_up_proj)
    size = sum(parameter.numel() for parameter in model.parameters())
    del experts
    unfuse_experts(model)
    assert fused() is None
    assert sum(parameter.numel() for parameter in model.parameters()) == size
    storages = [parameter.untyped_storage().data_ptr() for parameter in model.parameters()]
    assert len(set(storages)) == len(storages)
    layer = model.model.layers[0].mlp.experts.get_submodule("0")
    assert layer.w1.weight.untyped_storage().nbytes() == layer.w1.weight.numel() * 4


@needs_fused
def test_gradients_reach_the_split_experts() -> None:
    model = build("qwen3_moe")
    unfuse_experts(model)
    model(ids()).logits.square().sum().backward()
    grads = [p.grad for key, p in model.named_parameters() if ".experts." in key]
    assert sum(grad is not None for grad in grads) > len(grads) // 2


@needs_fused
def test_unused_and_out_of_range_experts_do_not_run() -> None:
    model = build("qwen3_moe")
    unfuse_experts(model)
    experts = model.model.layers[0].mlp.experts
    ran = []
    for i in range(4):
        experts.get_submodule(f"{i}.down_proj").register_forward_hook(lambda *_, i=i: ran.append(i))
    x = torch.randn(3, 64)
    index = torch.tensor([[2, 4], [4, 2], [4, 4]])  # 4: an expert that lives on another device
    with torch.no_grad():
        y = experts(x, index, torch.full((3, 2), 0.5))
        alone = experts.expert(2, x[:2]) * 0.5
    assert set(ran) == {2}
    torch.testing.assert_close(y[:2], alone)
    assert not y[2].any()
    assert experts(x[:0], index[:0], torch.zeros(0, 2)).shape == (0, 64)


@needs_fused
def test_split_model_can_be_copied_and_pickled() -> None:
    model = build("gpt_oss")
    unfuse_experts(model)
    expected = logits(model)
    assert torch.equal(logits(copy.deepcopy(model)), expected)
    experts = model.model.layers[0].mlp.experts
    again = pickle.loads(pickle.dumps(experts))
    x, index, weights = torch.randn(3, 64), torch.tensor([[0, 1], [2, 3], [1, 3]]), torch.rand(3, 2)
    with torch.no_grad():
        assert torch.equal(again(x, index, weights), experts(x, index, weights))


@needs_fused
def test_split_experts_break_the_graph_and_no_more() -> None:
    model = build("qwen3_moe", num_hidden_layers=1)
    unfuse_experts(model)
    block = model.model.layers[0].mlp
    compiled = torch.compile(block, backend="eager")
    x = torch.randn(1, 7, 64)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), block(x))


@needs_fused
@pytest.mark.slow
def test_split_experts_generate_under_torch_compile() -> None:
    model = build("qwen3_moe", num_hidden_layers=1)
    settings = {"max_new_tokens": 3, "do_sample": False}
    expected = model.generate(ids(1, 5), **settings)
    unfuse_experts(model)
    model.forward = torch.compile(model.forward, backend="eager")
    assert torch.equal(model.generate(ids(1, 5), **settings), expected)


@needs_fused
@pytest.mark.parametrize("name", ["mixtral", "phimoe", "nemotron_h", "deepseek_v3"])
def test_split_model_saves_the_names_of_the_original_checkpoint(name: str, tmp_path: Path) -> None:
    model = build(name)
    model.save_pretrained(tmp_path / "fused")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "fused")
    for folder, one in (("fresh", model), ("loaded", loaded)):
        unfuse_experts(one)
        one.save_pretrained(tmp_path / folder)
        original, split = (load_file(tmp_path / which / "model.safetensors") for which in ("fused", folder))
        assert original.keys() == split.keys()
        assert all(torch.equal(original[key], split[key]) for key in original)


def test_nothing_happens_to_models_without_fused_experts() -> None:
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model("llama", **TINY))
    before = [*model.named_modules()]
    assert unfuse_experts(model) == []
    assert replace_fused_experts(model, ["model.layers.0.mlp.gate_proj"], ["model.layers.0.mlp.gate_proj"]) == []
    assert drop_fused_conversions(["anything"], model) == ["anything"]
    assert [*model.named_modules()] == before


@pytest.mark.skipif(FUSED, reason="about transformers 4")
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_modules_of_transformers_4_are_left_as_they_are(name: str) -> None:
    model = build(name)
    assert unfuse_experts(model) == []
    assert not expert_lists(model)


# -- preparing a model for a checkpoint ----------------------------------------------------------------------------


@needs_fused
def test_replacing_happens_on_meta_and_only_for_quantized_experts() -> None:
    with torch.device("meta"):
        model = build_on_meta("mixtral")
    layers = ["model.layers.0.self_attn.q_proj", *(f"model.layers.1.mlp.experts.{i}.w1" for i in range(4))]
    assert replace_fused_experts(model, layers, layers[:1]) == []
    replaced = replace_fused_experts(model, layers, layers[1:])
    assert replaced == ["model.layers.0.mlp.experts", "model.layers.1.mlp.experts"]
    assert model.model.layers[0].mlp.experts.get_submodule("3.w2").weight.is_meta
    assert model.model.layers[0].mlp.experts.get_submodule("3.w2").weight.shape == (64, 96)


def build_on_meta(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(name, **{**TINY, **MODELS[name]}))


@needs_fused
@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe", "phimoe"])
def test_only_conversions_of_experts_are_dropped(name: str) -> None:
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming

    model = build(name)
    conversions = get_model_conversion_mapping(model)
    assert drop_fused_conversions(conversions, model) == conversions
    unfuse_experts(model)
    left = drop_fused_conversions(conversions, model)
    assert [c for c in left if isinstance(c, WeightRenaming)] == [
        c for c in conversions if isinstance(c, WeightRenaming)
    ]
    assert not any(isinstance(c, WeightConverter) for c in left)


@pytest.mark.parametrize("name", MODELS if FUSED else APART_IN_4)
def test_quantized_experts_load_by_plain_from_pretrained(name: str, tmp_path: Path) -> None:
    expected = quantized(name, tmp_path)
    saved = [key for key in keys(tmp_path) if key.endswith(".qweight")]
    assert any(".experts.3." in key for key in saved)
    assert not any("gate_up_proj" in key for key in saved)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) == len(saved)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", MODELS if FUSED else APART_IN_4)
def test_a_dequantized_mixture_is_saved_as_plain_transformers_finds_it(name: str, tmp_path: Path) -> None:
    quantized(name, tmp_path)
    check_dequantized(AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32), tmp_path / "loaded")
    model = build(name)
    gptq_transformers.quantize(model, QuantizeConfig(bits=4, group_size=16, quality="fast"), list(ids(6, 20)))
    check_dequantized(model, tmp_path / "in memory")


@pytest.mark.parametrize(
    ("name", "infix"), [("mixtral", "block_sparse_moe.experts.0.w1"), ("qwen3_moe", "mlp.experts.0.gate_proj")]
)
def test_names_in_the_file_are_those_that_other_readers_expect(name: str, infix: str, tmp_path: Path) -> None:
    quantized(name, tmp_path / "one")
    assert f"model.layers.0.{infix}.qweight" in keys(tmp_path / "one")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "one")
    loaded.save_pretrained(tmp_path / "two")
    first, second = (load_file(tmp_path / which / "model.safetensors") for which in ("one", "two"))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_dense_and_quantized_experts_mix_in_one_layer(name: str, tmp_path: Path) -> None:
    rules = {r"-:.*layers\.0\..*experts\.[02]\.": {}, r"-:.*layers\.1\..*experts\.": {}}
    expected = quantized(name, tmp_path, dynamic=rules)
    saved = keys(tmp_path)
    first = "gate_proj" if name == "qwen3_moe" else "w1"
    assert any(
        key.endswith(f"layers.0.{'mlp' if name == 'qwen3_moe' else 'block_sparse_moe'}.experts.0.{first}.weight")
        for key in saved
    )
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    kinds = {
        key: type(module)
        for key, module in loaded.named_modules()
        if ".experts." in key and isinstance(module, nn.Linear | QuantLinear)
    }
    assert sum(kind is QuantLinear for kind in kinds.values()) == 2 * 3
    assert sum(kind is nn.Linear for kind in kinds.values()) == 6 * 3
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


def test_model_with_dense_experts_only_keeps_the_frameworks_module(tmp_path: Path) -> None:
    expected = quantized("qwen3_moe", tmp_path, modules_in_block_to_quantize=("self_attn.q_proj",))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert not expert_lists(loaded)
    torch.testing.assert_close(logits(loaded), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["mixtral", "qwen3_moe"])
def test_checkpoint_of_16_bits_loads_in_float32_as_a_whole(name: str, tmp_path: Path) -> None:
    """Transformers gives renamed tensors of a quantized model the file's dtype; a router in bf16 then meets float32."""
    quantized(name, tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {
        key: value.bfloat16() if value.is_floating_point() and not key.endswith("scales") else value
        for key, value in load_file(path).items()
    }
    save_file(tensors, path, {"format": "pt"})
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {
        p.dtype for key, p in loaded.named_parameters() if p.is_floating_point() and not key.endswith("scales")
    } == {torch.float32}
    assert logits(loaded).isfinite().all()


def test_quantized_experts_generate_and_move_between_dtypes(tmp_path: Path) -> None:
    quantized("qwen3_moe", tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = loaded.generate(ids(1, 5), max_new_tokens=5, do_sample=False)
    twin = copy.deepcopy(loaded)
    assert torch.equal(twin.generate(ids(1, 5), max_new_tokens=5, do_sample=False), expected)
    half = logits(loaded.to(torch.bfloat16))
    assert half.dtype == torch.bfloat16
    assert float((half.float() - logits(twin)).norm() / logits(twin).norm()) < 0.05
