"""Tiny models with drafts for speculative decoding, written tensor by tensor under the names that published ones have.

Each is written twice: quantized, and as the dense twin that has the values of its dequantized weights. The next token
is mostly a fixed function of the last one, and the layers add enough to it that a draft is right often, not always:
what a draft computes shows in how many of its tokens are accepted.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from gptq_backend import QuantizedWeight
from gptq_backend.format import encode

VOCABULARY, HIDDEN, INTERMEDIATE, HEAD = 256, 64, 96, 32
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": HIDDEN,
    "intermediate_size": INTERMEDIATE,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": HEAD,
    "max_position_embeddings": 128,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "torch_dtype": "float32",
}
Tensors = dict[str, Tensor]


class Written(NamedTuple):
    """Folders of one model."""

    quantized: Path
    dense: Path


def write(
    folder: Path,
    config: Mapping[str, Any],
    tensors: Tensors,
    quantized: str,
    settings: Mapping[str, Any] | None = None,
) -> Written:
    """Write a model and its dense twin.

    Args:
        quantized: pattern of the layers' names that are quantized in the one: 4 bits, asymmetric, act-order.
        settings: more of its ``quantization_config``.
    """
    stored, dequantized = {}, {}
    for name, tensor in tensors.items():
        layer = name.removesuffix(".weight")
        if tensor.ndim == 2 and re.fullmatch(quantized, layer):
            parts, tensor = _quantized(tensor)
            stored |= {f"{layer}.{part}": value for part, value in parts.items()}
        else:
            stored[name] = tensor
        dequantized[name] = tensor
    how = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False, **(settings or {})}
    written = Written(folder / "quantized", folder / "dense")
    for path, content, extra in ((written[0], stored, {"quantization_config": how}), (written[1], dequantized, {})):
        path.mkdir(parents=True)
        (path / "config.json").write_text(json.dumps({**config, **extra}))
        save_file({key: value.clone() for key, value in content.items()}, path / "model.safetensors")
    return written


def _quantized(weight: Tensor) -> tuple[Tensors, Tensor]:
    """weight: float [N, K] -> the tensors of its checkpoint, and float [N, K] what they say."""
    bits, group = 4, 32
    features = weight.shape[1]
    order = torch.randperm(features, generator=torch.Generator().manual_seed(features))
    g_idx = torch.empty(features, dtype=torch.int32)
    g_idx[order] = torch.arange(features, dtype=torch.int32) // group
    groups = weight.t()[order].unflatten(0, (-1, group))  # [G, group, N]
    low, high = groups.amin(1).clamp(max=0), groups.amax(1).clamp(min=0)
    scales = ((high - low) / (2**bits - 1)).clamp(min=1e-6).half()
    zeros = (-low / scales.float()).round().clamp(0, 2**bits - 1)
    index = g_idx.long()
    codes = (weight.t() / scales.float()[index] + zeros[index]).round().clamp(0, 2**bits - 1)
    packed = QuantizedWeight(codes.to(torch.uint8), scales, zeros.to(torch.uint8), g_idx, bits)
    return encode(packed)[1], packed.dequantize()


class Maker:
    """Makes the tensors of models that fit together: one embedding, and one head that says what comes next."""

    def __init__(self, seed: int = 0, noise: float = 0.14) -> None:
        self._random = torch.Generator().manual_seed(seed)
        self._noise = noise
        self.embedding = self.normal(VOCABULARY, HIDDEN)
        self.following = torch.randperm(VOCABULARY, generator=self._random)
        self.head = torch.empty_like(self.embedding)
        self.head[self.following] = (
            self.embedding
        )  # the state of token t is nearest to the row of the one that follows it

    def normal(self, *shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=self._random) * scale

    def linear(self, out_features: int, in_features: int) -> Tensor:
        return self.normal(out_features, in_features, scale=self._noise)

    def passing(self, *parts: float) -> Tensor:
        """[H, H * len(parts)]: adds up the parts of its input with these weights, and noise."""
        exact = torch.cat([torch.eye(HIDDEN) * part for part in parts], dim=1)
        return exact + self.normal(*exact.shape, scale=0.02)

    def ends(self, prefix: str = "model.") -> Tensors:
        return {
            f"{prefix}embed_tokens.weight": self.embedding,
            f"{prefix}norm.weight": torch.ones(HIDDEN),
            "lm_head.weight": self.head,
        }

    def attention(self, prefix: str, inputs: int = HIDDEN, bias: bool = False) -> Tensors:
        sizes = {"q_proj": HIDDEN, "k_proj": HEAD, "v_proj": HEAD}
        tensors = {f"{prefix}.{name}.weight": self.linear(size, inputs) for name, size in sizes.items()}
        if bias:
            tensors |= {f"{prefix}.{name}.bias": self.normal(size, scale=0.1) for name, size in sizes.items()}
        return {**tensors, f"{prefix}.o_proj.weight": self.linear(HIDDEN, HIDDEN)}

    def mlp(self, prefix: str, width: int = INTERMEDIATE) -> Tensors:
        return {
            f"{prefix}.gate_proj.weight": self.linear(width, HIDDEN),
            f"{prefix}.up_proj.weight": self.linear(width, HIDDEN),
            f"{prefix}.down_proj.weight": self.linear(HIDDEN, width),
        }

    def experts(self, prefix: str, count: int, shared: str | None = None) -> Tensors:
        tensors = {f"{prefix}.gate.weight": self.normal(count, HIDDEN)}
        for expert in range(count):
            tensors |= self.mlp(f"{prefix}.experts.{expert}", 32)
        return tensors if shared is None else {**tensors, **self.mlp(f"{prefix}.{shared}", 32)}

    def norms(self, prefix: str, *names: str) -> Tensors:
        return {f"{prefix}.{name}.weight": torch.ones(HIDDEN) for name in names}

    def block(self, prefix: str, mlp: Callable[[str], Tensors] | None = None, **attention: Any) -> Tensors:
        return {
            **self.attention(f"{prefix}.self_attn", **attention),
            **(mlp or self.mlp)(f"{prefix}.mlp"),
            **self.norms(prefix, "input_layernorm", "post_attention_layernorm"),
        }


# -- models and drafts that are models of their own --------------------------------------------------------------------

LLAMA = {**SIZES, "model_type": "llama", "architectures": ["LlamaForCausalLM"]}
_MOE = {"num_experts_per_tok": 2, "moe_intermediate_size": 32, "norm_topk_prob": True, "num_nextn_predict_layers": 1}
_GROUPED = {"n_routed_experts": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
Model = tuple[dict[str, Any], Tensors]


def llama(maker: Maker, layers: int = 2) -> Model:
    tensors = maker.ends()
    for index in range(layers):
        tensors |= maker.block(f"model.layers.{index}")
    return {**LLAMA, "num_hidden_layers": layers}, tensors


def mixtral(maker: Maker, layers: int = 2) -> Model:
    tensors = maker.ends()
    for index in range(layers):
        tensors |= maker.block(f"model.layers.{index}", lambda prefix: {})
        for name, tensor in maker.experts(f"model.layers.{index}.block_sparse_moe", 4).items():
            for ours, theirs in (("gate_proj", "w1"), ("up_proj", "w3"), ("down_proj", "w2")):
                name = name.replace(ours, theirs)
            tensors[name] = tensor
    config = {"model_type": "mixtral", "architectures": ["MixtralForCausalLM"], "num_local_experts": 4}
    return {**SIZES, **config, "intermediate_size": 32, "num_experts_per_tok": 2, "num_hidden_layers": layers}, tensors


def eagle(maker: Maker) -> Model:
    """Sees the state behind the last token, and the token."""
    tensors = {"fc.weight": maker.passing(0.7, 0.3)} | maker.block("layers.0")
    del tensors["layers.0.input_layernorm.weight"]
    return {**LLAMA, "num_hidden_layers": 1}, tensors


def eagle3(maker: Maker) -> Model:
    """Sees the last token in its attention only: its head says what comes after the next one. Knows every other token.

    Its layers are fed with the states before both layers of the target.
    """
    block = maker.attention("midlayer.self_attn", 2 * HIDDEN) | maker.mlp("midlayer.mlp")
    norms = maker.norms("midlayer", "input_layernorm", "post_attention_layernorm", "hidden_norm")
    head = torch.empty_like(maker.embedding)
    head[maker.following[maker.following]] = maker.embedding
    tensors = {
        "fc.weight": maker.passing(0.7, 0.3),
        "norm.weight": torch.ones(HIDDEN),
        "lm_head.weight": head[::2],
        "d2t": torch.arange(VOCABULARY // 2),
        "t2d": torch.arange(VOCABULARY) % 2 == 0,
    }
    config = {"architectures": ["LlamaForCausalLMEagle3"], "draft_vocab_size": VOCABULARY // 2}
    inputs = {"num_aux_hidden_states": 2, "eagle_aux_hidden_state_layer_ids": [0, 1]}
    return {**LLAMA, **config, **inputs, "num_hidden_layers": 1}, tensors | block | norms


# -- models with a draft inside (multi-token prediction) ---------------------------------------------------------------


def mimo(maker: Maker) -> Model:
    tensors, mtp = maker.ends(), "model.mtp_layers.0"
    for prefix in ("model.layers.0", "model.layers.1", mtp):
        tensors |= maker.block(prefix, bias=True)
    tensors |= maker.norms(mtp, "token_layernorm", "hidden_layernorm", "final_layernorm")
    tensors[f"{mtp}.input_proj.weight"] = maker.passing(0.3, 1.0)
    # transformers has no such model type; vLLM goes by the architecture.
    config = {"model_type": "qwen2", "architectures": ["MiMoForCausalLM"], "num_nextn_predict_layers": 1}
    return {**SIZES, **config}, tensors


def glm4_moe(maker: Maker) -> Model:
    config = {"model_type": "glm4_moe", "architectures": ["Glm4MoeForCausalLM"], "partial_rotary_factor": 0.5}
    return {**SIZES, **_MOE, **_GROUPED, **config, "attention_bias": False}, _deepseek_like(maker, maker.attention)


def deepseek_v3(maker: Maker) -> Model:
    def latent(prefix: str) -> Tensors:
        sizes = {
            "q_proj": (2 * 192, HIDDEN),
            "kv_a_proj_with_mqa": (576, HIDDEN),
            "kv_b_proj": (512, 512),
            "o_proj": (HIDDEN, 256),
        }
        tensors = {f"{prefix}.{name}.weight": maker.linear(*size) for name, size in sizes.items()}
        tensors[f"{prefix}.kv_b_proj.weight"] /= 3  # it has many inputs
        return {**tensors, f"{prefix}.kv_a_layernorm.weight": torch.ones(512)}

    heads = {"head_dim": 64, "num_key_value_heads": 2, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64}
    ranks = {"kv_lora_rank": 512, "q_lora_rank": None, "v_head_dim": 128}
    config = {"model_type": "deepseek_v3", "architectures": ["DeepseekV3ForCausalLM"], "topk_method": "noaux_tc"}
    return {**SIZES, **_MOE, **_GROUPED, **heads, **ranks, **config}, _deepseek_like(maker, latent)


def _deepseek_like(maker: Maker, attention: Callable[[str], Tensors]) -> Tensors:
    def sparse(prefix: str) -> Tensors:
        correction = {f"{prefix}.gate.e_score_correction_bias": torch.zeros(4)}
        return maker.experts(prefix, 4, "shared_experts") | correction

    tensors, mtp = maker.ends(), "model.layers.2"
    for index, mlp in enumerate((maker.mlp, sparse, sparse)):
        prefix = f"model.layers.{index}"
        tensors |= attention(f"{prefix}.self_attn") | mlp(f"{prefix}.mlp")
        tensors |= maker.norms(prefix, "input_layernorm", "post_attention_layernorm")
    tensors |= maker.norms(mtp, "enorm", "hnorm", "shared_head.norm")
    ends = {"eh_proj": maker.passing(1.0, 0.3), "embed_tokens": maker.embedding, "shared_head.head": maker.head}
    return tensors | {f"{mtp}.{name}.weight": tensor for name, tensor in ends.items()}


def ernie4_5_moe(maker: Maker) -> Model:
    def sparse(prefix: str) -> Tensors:
        correction = {f"{prefix}.moe_statics.e_score_correction_bias": torch.zeros(1, 4)}
        return maker.experts(prefix, 4, "shared_experts") | correction

    tensors = maker.ends() | maker.block("model.layers.0") | maker.block("model.layers.1", sparse)
    tensors |= maker.block("model.mtp_block.0") | maker.norms("model", "mtp_emb_norm.0", "mtp_hidden_norm.0")
    tensors["model.mtp_linear_proj.0.weight"] = maker.passing(1.0, 0.3)
    experts = {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "use_bias": False}
    layers = {"moe_layer_start_index": 1, "moe_layer_end_index": 1, "moe_layer_interval": 1}
    config = {"model_type": "ernie4_5_moe", "architectures": ["Ernie4_5_MoeForCausalLM"]}
    return {**SIZES, **_MOE, **experts, **layers, **config}, tensors


def qwen3_next(maker: Maker) -> Model:
    """With full attention in all layers."""
    tensors = maker.ends()
    for prefix in ("model.layers.0", "model.layers.1", "mtp.layers.0"):
        tensors |= maker.block(prefix, lambda prefix: maker.experts(prefix, 4, "shared_expert"))
        tensors[f"{prefix}.mlp.shared_expert_gate.weight"] = maker.normal(1, HIDDEN)
        tensors[f"{prefix}.self_attn.q_proj.weight"] = maker.linear(2 * HIDDEN, HIDDEN)  # with a gate
        tensors |= {f"{prefix}.self_attn.{name}.weight": torch.ones(HEAD) for name in ("q_norm", "k_norm")}
    tensors |= maker.norms("mtp", "norm", "pre_fc_norm_hidden", "pre_fc_norm_embedding")
    tensors["mtp.fc.weight"] = maker.passing(0.5, 0.5)
    # Its norms multiply by one more than their weight.
    tensors = {name: tensor - 1 if "norm" in name else tensor for name, tensor in tensors.items()}
    config = {"model_type": "qwen3_next", "architectures": ["Qwen3NextForCausalLM"], "partial_rotary_factor": 0.5}
    experts = {"num_experts": 4, "shared_expert_intermediate_size": 32, "decoder_sparse_step": 1}
    return {**SIZES, **_MOE, **config, **experts, "layer_types": ["full_attention"] * 2}, tensors
