"""Tiny models of many architectures, with random weights and quantized by this package: log-probabilities are right."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gptq_backend import QuantizeConfig
from tests.transformers.checkpoints import ids, tiny, write
from tests.vllm.engine import Engine
from tests.vllm.test_offline import BOUND, distance

SETTINGS = QuantizeConfig(group_size=32, desc_act=True, sym=False)
TWO = {"num_key_value_heads": 2}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 96}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2}
LATENT = {"kv_lora_rank": 512, "q_lora_rank": None, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64, "v_head_dim": 128}
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "n_group": 1, "topk_group": 1}
DEEPSEEK = {**EXPERTS, **LATENT, **ROUTED, **TWO, "first_k_dense_replace": 1}
# vLLM reads keys that transformers' class no longer has.
SIGMOID = {"head_dim": 64, "topk_method": "noaux_tc", "norm_topk_prob": True}
SLIDING = {"layer_types": ["sliding_attention", "full_attention"]}
SHARED = {"shared_expert_intermediate_size": 96}
SHORT = {"n_embd": 64, "n_layer": 2, "n_head": 2, "n_positions": 128}
MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 32, "mamba_d_state": 16, "mamba_n_groups": 1}
DELTA = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 128}
DELTA |= {"linear_value_head_dim": 128, "layer_types": ["linear_attention", "full_attention"]}  # type: ignore[dict-item]
PLAIN = "mistral gemma gemma2 gemma3 phi3 gpt2 stablelm olmo olmo2 granite glm glm4 nemotron smollm3 hunyuan_v1_dense"
PLAIN += " ernie4_5 seed_oss apertus arcee cohere cohere2 ministral3 helium"
ARCHITECTURES: dict[str, dict[str, Any]] = {
    **{name: {} for name in PLAIN.split()},
    **dict.fromkeys(("exaone4", "olmo3"), SLIDING),
    **dict.fromkeys(("granitemoe", "mixtral"), LOCAL),
    "phi": TWO,
    "starcoder2": {"use_bias": True},
    "falcon": {"head_dim": ..., "multi_query": True, "alibi": False, "ffn_hidden_size": 256},
    "gptj": {**SHORT, "rotary_dim": 16},
    "gpt_bigcode": SHORT,
    "gemma3n_text": {
        **SLIDING,
        "intermediate_size": [96, 96],
        "activation_sparsity_pattern": [0.0, 0.0],
        "laurel_rank": 16,
        "num_kv_shared_layers": 0,
        "altup_num_inputs": 2,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 259,
    },
    "gemma4_text": {
        **SLIDING,
        "global_head_dim": 32,
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 32,
        "vocab_size_per_layer_input": 259,
    },
    "olmoe": {**EXPERTS, **TWO},
    "flex_olmo": {**LOCAL, **TWO, "num_experts": 4},
    "qwen2_moe": {**EXPERTS, **SHARED, "decoder_sparse_step": 1},
    "qwen3_moe": {**EXPERTS, "decoder_sparse_step": 1},
    "qwen3_next": {**EXPERTS, **SHARED, **DELTA, "decoder_sparse_step": 1},
    "glm4_moe": {**EXPERTS, **ROUTED, "first_k_dense_replace": 1},
    "glm4_moe_lite": {**DEEPSEEK, **SIGMOID, "mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v2": {**DEEPSEEK, "topk_method": "greedy"},
    "deepseek_v3": {**DEEPSEEK, **SIGMOID, "q_lora_rank": 64},
    "dots1": {**EXPERTS, **ROUTED, "first_k_dense_replace": 1},
    "ernie4_5_moe": {
        "moe_num_experts": 4,
        "moe_k": 2,
        "moe_intermediate_size": 96,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
    },
    "exaone_moe": {**EXPERTS, "num_shared_experts": 1},
    "cohere2_moe": EXPERTS,
    "afmoe": {
        **EXPERTS,
        **TWO,
        **SLIDING,
        "num_dense_layers": 1,
        "score_func": "sigmoid",
        "route_norm": True,
        "n_group": 1,
        "topk_group": 1,
    },
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2},  # its code asks for the dtype of the router's weight
    # vLLM sorts the channels of its dense q_proj and k_proj while it loads them.
    "llama4_text": {
        "num_local_experts": 4,
        "intermediate_size_mlp": 96,
        "interleave_moe_layer_step": 1,
        "attention_chunk_size": 128,
    },
    "phimoe": {**LOCAL, "attention_bias": True},
    "granitemoeshared": {**LOCAL, "shared_intermediate_size": 96},
    "granitemoehybrid": {
        **LOCAL,
        **MAMBA,
        "shared_intermediate_size": 96,
        "layer_types": ["mamba", "attention"],
    },
    "falcon_h1": {**MAMBA, "mamba_d_ssm": 128},
}
PUBLISHED = {"phimoe": "PhiMoEForCausalLM"}  # what checkpoints say, where transformers' class has another name
IN_SHORT = ("llama4_text", "granitemoehybrid")


@pytest.mark.parametrize(
    "model_type", [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.slow) for name in ARCHITECTURES]
)
def test_every_architecture_gives_the_right_logprobs(engine: Engine, model_type: str, tmp_path: Path) -> None:
    expected = write(tmp_path, tiny(model_type, **ARCHITECTURES[model_type]), SETTINGS)[0]
    options = {"hf_overrides": {"architectures": [PUBLISHED[model_type]]}} if model_type in PUBLISHED else {}
    value = distance(engine.logprobs(tmp_path, ids()[0], **options), expected)
    print(f"{model_type}: {value:.4f}")
    assert value < BOUND / 4  # logits of random weights are small
