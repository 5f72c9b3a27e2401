"""One tiny random model per architecture: quantize, save, load with plain ``from_pretrained``, compare."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
from safetensors import safe_open
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

import gptq_transformers
from gptq_backend import QuantizeConfig, QuantLinear

VOCABULARY = 128


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """Matrices this small only wait for each other on more."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def tiny(model_type: str, **extra: Any) -> Any:
    """A configuration with the field names that most architectures understand."""
    settings: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return AutoConfig.for_model(model_type, **{**settings, **extra})


def llama_like(model_type: str, **extra: Any) -> Any:
    return tiny(model_type, **{"num_key_value_heads": 2, "head_dim": 16, **extra})


ATTENTION = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"]
MLP = ["mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
LLAMA = (ATTENTION + MLP, 4)
OPT_LAYERS = [*(f"self_attn.{name}_proj" for name in ("k", "v", "q", "out")), "fc1", "fc2"]
NEOX = ["attention.query_key_value", "attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
BLOOM = ["self_attention.query_key_value", "self_attention.dense", "mlp.dense_h_to_4h", "mlp.dense_4h_to_h"]
GPT2 = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]
PHI = ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.dense", "mlp.fc1", "mlp.fc2"]
MIXTRAL = ATTENTION + [f"block_sparse_moe.experts.{i}.{name}" for i in range(4) for name in ("w1", "w3", "w2")]
QWEN3_MOE = ATTENTION + [f"mlp.experts.{i}.{name}_proj" for i in range(4) for name in ("gate", "up", "down")]
FALCON = {"ffn_hidden_size": 96, "alibi": False}
MOE = {"num_experts_per_tok": 2, "num_local_experts": 4}
QWEN_MOE = {"num_experts_per_tok": 2, "num_experts": 4, "moe_intermediate_size": 48}

# name: (config, where the blocks are in the file, layers of a block by their names in the file, distinct inputs of a block)
ARCHITECTURES: dict[str, tuple[Callable[[], Any], str, list[str], int]] = {
    "llama": (lambda: llama_like("llama"), "model.layers", *LLAMA),
    "llama-tied": (lambda: llama_like("llama", tie_word_embeddings=True, mlp_bias=True), "model.layers", *LLAMA),
    "mistral": (lambda: llama_like("mistral", sliding_window=8), "model.layers", *LLAMA),
    "qwen2": (lambda: llama_like("qwen2", tie_word_embeddings=True), "model.layers", *LLAMA),
    "qwen3": (lambda: llama_like("qwen3", head_dim=24), "model.layers", *LLAMA),
    "gemma": (lambda: llama_like("gemma"), "model.layers", *LLAMA),
    "gemma2": (lambda: llama_like("gemma2", sliding_window=8), "model.layers", *LLAMA),
    "gemma3": (lambda: llama_like("gemma3_text", sliding_window=8), "model.layers", *LLAMA),
    "phi": (lambda: tiny("phi"), "model.layers", PHI, 3),  # parallel: q, k, v and fc1 read the same tensor
    "opt": (
        lambda: tiny("opt", ffn_dim=96, word_embed_proj_dim=48, do_layer_norm_before=True),
        "model.decoder.layers",
        OPT_LAYERS,
        4,
    ),
    "gpt2": (lambda: tiny("gpt2", n_embd=64, n_layer=2, n_head=4, n_positions=64), "transformer.h", GPT2, 4),
    "gpt_neox": (lambda: tiny("gpt_neox"), "gpt_neox.layers", NEOX, 4),
    "falcon": (
        lambda: tiny("falcon", multi_query=True, parallel_attn=True, bias=False, **FALCON),
        "transformer.h",
        BLOOM,
        3,  # parallel: attention and MLP read the same tensor
    ),
    "falcon-sequential": (
        lambda: tiny("falcon", multi_query=False, parallel_attn=False, bias=True, **FALCON),
        "transformer.h",
        BLOOM,
        4,
    ),
    "falcon-new": (
        lambda: tiny("falcon", new_decoder_architecture=True, num_kv_heads=2, **FALCON),
        "transformer.h",
        BLOOM,
        4,  # parallel, but with a norm each
    ),
    "bloom": (lambda: tiny("bloom", n_layer=3, n_head=4, apply_residual_connection_post_layernorm=True), "transformer.h", BLOOM, 4),
    "mixtral": (lambda: llama_like("mixtral", **MOE), "model.layers", MIXTRAL, 2 + 2 * 4),
    "qwen3_moe": (lambda: llama_like("qwen3_moe", **QWEN_MOE), "model.layers", QWEN3_MOE, 2 + 2 * 4),
}


def build(name: str, **changes: Any) -> PreTrainedModel:
    """A random model whose logits depend visibly on every layer."""
    torch.manual_seed(0)
    config = ARCHITECTURES[name][0]()
    for key, value in changes.items():
        setattr(config, key, value)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
            else:  # also biases, which are created as zeros
                parameter.add_(torch.randn_like(parameter) * 0.05)
    return model


def samples(count: int = 6, length: int = 20, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (length,), generator=generator) for _ in range(count)]


def config(**settings: Any) -> QuantizeConfig:
    return QuantizeConfig(**{"bits": 4, "group_size": 16, **settings})


@torch.no_grad()
def logits(model: nn.Module, seed: int = 9) -> Tensor:
    return model(torch.stack(samples(2, 16, seed))).logits.float()


def quantized_in(folder: Path) -> list[str]:
    with safe_open(folder / "model.safetensors", "pt") as file:
        return [key.removesuffix(".qweight") for key in file.keys() if key.endswith(".qweight")]


def quant_linears(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


def distance(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_quantized_saved_and_loaded_model_gives_the_same_logits(name: str, tmp_path: Path) -> None:
    model = build(name)
    _, prefix, layers, _ = ARCHITECTURES[name]
    settings = config(true_sequential=name not in ("mistral", "gpt2"), desc_act=name in ("qwen2", "opt"))
    quantized, report = gptq_transformers.quantize(model, settings, samples(), output=tmp_path / "out")
    blocks = model.config.get_text_config().num_hidden_layers
    expected = [f"{prefix}.{i}.{layer}" for i in range(blocks) for layer in layers]
    assert sorted(quantized_in(tmp_path / "out")) == sorted(expected)
    assert len(report.layers) == len(expected)
    before = logits(quantized)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert len(quant_linears(loaded)) == len(expected)
    torch.testing.assert_close(logits(loaded), before, atol=1e-5, rtol=1e-5)
    loaded.save_pretrained(tmp_path / "again")
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as one, safe_open(tmp_path / "again" / "model.safetensors", "pt") as two:
        assert set(one.keys()) == set(two.keys())
        assert all(torch.equal(one.get_tensor(key), two.get_tensor(key)) for key in one.keys())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_eight_bits_stay_close_and_distinct_inputs_are_counted(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import gptq_backend.quantize as driver

    made = []
    original = driver.Hessian

    class Counted(original):  # type: ignore[misc,valid-type]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self)

    monkeypatch.setattr(driver, "Hessian", Counted)
    model = build(name)
    expected = logits(model)
    # Fewer layers suffice for a dense model; which experts get tokens depends on the first block.
    gptq_transformers.quantize(model, config(bits=8, scale_search=False), samples(12))
    blocks = model.config.get_text_config().num_hidden_layers
    assert len(made) == blocks * ARCHITECTURES[name][3]
    assert distance(logits(model), expected) < 0.03
