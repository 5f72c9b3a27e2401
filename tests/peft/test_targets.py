"""Which layers adapters may lie on: chosen by name, pattern or kind; the head, experts, and layers of odd classes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from torch import nn

from gptq_backend import QuantLinear
from gptq_transformers import GPTQConfig
from gptq_transformers.experts.expert_list import ExpertList
from tests.peft.training import EXPERTS, quantized, reloaded, saved_tensors, train
from tests.transformers.checkpoints import VERSION_4, distance, ids, load, logits


def lora(base: nn.Module, **options: Any) -> PeftModel:
    options = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", **options}
    return get_peft_model(base, LoraConfig(**options))


def adapted(model: nn.Module) -> set[str]:
    """Names of the layers, without the numbers of blocks."""
    names = (name for name, module in model.named_modules() if isinstance(module, LoraLayer))
    return {name.rpartition("layers.")[2].partition(".")[2] or name for name in names}


ATTENTION = {f"self_attn.{part}_proj" for part in "qkvo"}
MLP = {f"mlp.{part}_proj" for part in ("gate", "up", "down")}
TARGETS: dict[str, tuple[Any, dict[str, Any], set[str]]] = {
    "names": (["k_proj", "up_proj"], {}, {"self_attn.k_proj", "mlp.up_proj"}),
    "a pattern": (r".*self_attn\.(q|o)_proj", {}, {"self_attn.q_proj", "self_attn.o_proj"}),
    "all linear layers": ("all-linear", {}, ATTENTION | MLP),
    "some blocks": (["q_proj"], {"layers_to_transform": [1]}, {"self_attn.q_proj"}),
    "all but some": ("all-linear", {"exclude_modules": ["down_proj"]}, ATTENTION | MLP - {"mlp.down_proj"}),
    "none given": (None, {}, {"self_attn.q_proj", "self_attn.v_proj"}),
}


@pytest.mark.parametrize("name", TARGETS)
def test_layers_are_chosen_as_in_a_dense_model(name: str, checkpoint: Callable[..., Path]) -> None:
    targets, options, expected = TARGETS[name]
    base, dense = load(checkpoint()), load(checkpoint())
    dense.dequantize()
    for model in (base, dense):
        assert adapted(lora(model, target_modules=targets, **options)) == expected


def test_ranks_by_pattern_are_kept(checkpoint: Callable[..., Path]) -> None:
    model = lora(load(checkpoint()), target_modules=["q_proj", "k_proj"], rank_pattern={"k_proj": 2})
    attention = model.base_model.model.model.layers[0].self_attn
    assert (attention.q_proj.r["default"], attention.k_proj.r["default"]) == (4, 2)


@pytest.fixture
def with_head(checkpoint: Callable[..., Path], tmp_path: Path) -> Path:
    """A checkpoint whose output embedding is quantized too."""
    settings = GPTQConfig(bits=4, quantize_head=8)
    load(checkpoint(), quantization_config=settings).save_pretrained(tmp_path / "head")
    assert isinstance(load(tmp_path / "head").lm_head, QuantLinear)
    return tmp_path / "head"


def test_a_quantized_head_takes_an_adapter(with_head: Path, tmp_path: Path) -> None:
    model = lora(load(with_head), target_modules=["q_proj", "lm_head"])
    assert train(model) > 0.1
    trained = logits(model)
    again = reloaded(model, with_head, tmp_path / "adapter")
    assert torch.equal(logits(again), trained)
    assert all("lora_" in key for key in saved_tensors(tmp_path / "adapter"))
    merged = again.merge_and_unload()
    assert type(merged.lm_head) is nn.Linear
    assert distance(logits(merged), trained) < 1e-5


def test_a_quantized_head_that_is_trained_as_a_whole_is_dense_in_the_adapter(with_head: Path, tmp_path: Path) -> None:
    base = load(with_head)
    expected = logits(base)
    model = lora(base, target_modules=["q_proj"], modules_to_save=["lm_head"])
    assert train(model) > 0.1
    trained = logits(model)
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)
    again = reloaded(model, with_head, tmp_path / "adapter")
    assert torch.equal(logits(again), trained)
    heads = [value for key, value in saved_tensors(tmp_path / "adapter").items() if "lm_head" in key]
    assert [tuple(head.shape) for head in heads] == [(259, 64)]
    merged = again.merge_and_unload()
    assert type(merged.lm_head) is nn.Linear
    assert distance(logits(merged), trained) < 1e-5


def test_a_module_of_quantized_layers_is_trained_as_a_whole(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    model = lora(load(checkpoint()), target_modules=["q_proj"], modules_to_save=["mlp"])
    assert train(model) > 0.1
    assert torch.equal(logits(reloaded(model, checkpoint(), tmp_path)), logits(model))


def test_experts_take_adapters_by_the_names_that_the_checkpoint_has(
    checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    family, sizes, names = EXPERTS
    folder = checkpoint(family, **sizes)
    base = load(folder)
    expected = logits(base)
    model = lora(base, target_modules=names)
    assert any("experts" in name for name in adapted(model))
    assert train(model) > 0.02
    trained = logits(model)
    with model.disable_adapter():
        assert distance(logits(model), expected) < 1e-6
    again = reloaded(model, folder, tmp_path)
    assert torch.equal(logits(again), trained)
    merged = again.merge_and_unload()
    assert distance(logits(merged), trained) < 1e-5
    assert not any(quantized(module) for module in merged.modules() if isinstance(module, ExpertList))


def test_adapters_beside_experts_leave_their_single_call_alone(checkpoint: Callable[..., Path]) -> None:
    if VERSION_4:
        pytest.skip("transformers 4 keeps experts apart")
    base = load(checkpoint(EXPERTS[0], **EXPERTS[1]))
    expected = logits(base)
    model = lora(base, target_modules=["q_proj"])
    assert train(model) > 0.01
    with model.disable_adapter():
        assert torch.equal(logits(model), expected)


@pytest.mark.parametrize(
    ("family", "targets"), [("gpt2", ["c_attn", "c_proj"]), ("phi3", ["qkv_proj", "gate_up_proj"]), ("opt", None)]
)
def test_layers_of_other_names_and_classes_are_merged_to_what_the_model_has(
    family: str, targets: list[str] | None, checkpoint: Callable[..., Path], tmp_path: Path
) -> None:
    """GPT-2 stores weights transposed: what is merged must lie in the files as a new GPT-2 expects it."""
    sizes = {"word_embed_proj_dim": 64, "ffn_dim": 96} if family == "opt" else {}
    folder = checkpoint(family, **sizes)
    model = lora(load(folder), target_modules=targets)
    assert train(model) > 0.02
    trained = logits(model)
    merged = model.merge_and_unload()
    assert distance(logits(merged), trained) < 1e-5
    merged.save_pretrained(tmp_path)
    assert distance(logits(load(tmp_path)), trained) < 1e-5


def test_t5_reads_the_dtype_of_a_dense_weight_through_an_adapter(tmp_path: Path) -> None:
    """It casts its activations to that of ``wo.weight``; peft would show it the packed integers."""
    sizes = {"d_model": 64, "d_kv": 32, "d_ff": 96, "num_layers": 1, "num_heads": 2, "vocab_size": 259}
    torch.manual_seed(0)
    config = transformers.T5Config(**sizes, decoder_start_token_id=0, tie_word_embeddings=False)
    model = transformers.T5ForConditionalGeneration(config).eval()
    from gptq_backend import QuantizeConfig, quantize_model

    inputs = {"input_ids": ids(), "decoder_input_ids": ids(8)}
    encoder = model.encoder
    quantize_model(encoder, QuantizeConfig(bits=4, group_size=32, quality="fast"), [ids(64)])
    assert quantized(model)
    with torch.no_grad():
        expected = model(**inputs).logits
        adapter = LoraConfig(r=4, target_modules=["q", "wo"], task_type="SEQ_2_SEQ_LM")
        found = get_peft_model(model, adapter).eval()(**inputs).logits
    assert distance(found, expected) < 1e-6
    wo = model.encoder.block[0].layer[1].DenseReluDense.wo
    assert isinstance(wo, LoraLayer)
    assert wo.weight.dtype == torch.float32
