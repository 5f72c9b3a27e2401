"""Small random models of every architecture that transformers knows, for architectures.py."""

from __future__ import annotations

from typing import Any

LARGEST = 60_000_000  # parameters
VOCABULARY = 256
TASKS = {  # auto class, and where transformers lists the model types that it loads
    "causal": ("AutoModelForCausalLM", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES"),
    "image-text-to-text": ("AutoModelForImageTextToText", "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES"),
    "seq2seq": ("AutoModelForSeq2SeqLM", "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES"),
    "speech": ("AutoModelForSpeechSeq2Seq", "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES"),
}

# What sizes are called, and a small one for each. A config gets those that it has.
SIZES: dict[int, str] = {
    64: "hidden_size d_model n_embd n_embed dim embed_dim emb_dim embedding_size embedding_dim word_embed_proj_dim "
    "attention_hidden_size lru_width conv_dim out_hidden_size q_lora_rank o_lora_rank",
    96: "intermediate_size ffn_dim n_inner ffn_hidden_size d_ff dim_ff d_inner dff encoder_ffn_dim "
    "decoder_ffn_dim "
    "block_ff_dim dense_intermediate_size intermediate_size_mlp shared_intermediate_size",
    48: "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size moe_ffn_hidden_size "
    "moe_shared_expert_intermediate_size speech_encoder_intermediate_size",
    32: "image_size audio_hidden_size attention_window_size attention_chunk_size mamba_d_head mamba_head_dim "
    "mamba_headdim num_position_embeddings",
    16: "head_dim d_kv kv_lora_rank qk_nope_head_dim v_head_dim index_head_dim linear_key_head_dim "
    "linear_value_head_dim hidden_size_per_layer_input sliding_window window_size mamba_chunk_size chunk_size "
    "index_topk kv_channels attention_head_dim",
    24: "qk_head_dim",
    8: "qk_rope_head_dim state_size ssm_state_size mamba_d_state laurel_rank patch_size rotary_dim adapter_rank",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads decoder_attention_heads attention_heads "
    "num_query_heads num_experts num_local_experts n_routed_experts moe_num_experts mamba_n_heads mamba_num_heads "
    "linear_num_value_heads speech_encoder_attention_heads mamba_dt_rank time_step_rank n_mamba_heads",
    3: "conv_L_cache",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers "
    "encoder_num_hidden_layers depth num_key_value_heads num_kv_heads num_experts_per_tok num_experts_per_token "
    "moe_topk moe_k moe_top_k experts_per_token num_selected_experts index_n_heads linear_num_key_heads mamba_expand "
    "num_blocks speech_encoder_layers eos_token_id",
    1: "n_shared_experts num_shared_experts n_group topk_group first_k_dense_replace mamba_n_groups mamba_ngroups "
    "n_groups num_mem_blocks decoder_start_token_id bos_token_id",
    0: "num_kv_shared_layers num_nextn_predict_layers num_mtp_layers pad_token_id",
    128: "n_positions max_position_embeddings max_seq_len n_ctx context_length mamba_d_ssm",
    VOCABULARY: "vocab_size vocab_size_per_layer_input",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()}
# None means "as large as another size says" for these, so that they stay None.
DERIVED = {"n_inner", "head_dim", "q_lora_rank", "sliding_window", "num_experts", "num_local_experts", "rotary_dim"}

# What the sizes above do not fit: settings by the names of the config, nested where it is.
INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 16,
    "indexer_budget": 16,
    "indexer_compress_ratio": 4,
}
ZAMBA = {"layers_block_type": ["linear_attention", "hybrid"] * 2, "num_hidden_layers": 4}
MAMBA_HYBRID = {"num_hidden_layers": 2, "mamba_n_heads": 4, "mamba_d_head": 32}
SPECIAL: dict[str, dict[str, Any]] = {
    "blt": {
        "num_hidden_layers": 2,
        "encoder_hash_byte_group_vocab": 64,
        "encoder_config": {"hidden_size_global": 64},
        "decoder_config": {"hidden_size_global": 64},
    },
    "bamba": {**MAMBA_HYBRID, "attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
        }
    },
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"hidden_size": 64, "ffn_hidden_size": 96, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "gemma3n_text": {
        "num_hidden_layers": 2,
        "intermediate_size": [96, 96],
        "activation_sparsity_pattern": [0.5, 0.0],
        "layer_types": ["sliding_attention", "full_attention"],
    },
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {**MAMBA_HYBRID, "layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "use_mamba_kernels": False},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "mamba2": {"num_heads": 4, "head_dim": 32},
    "ministral": {"head_dim": 16},
    "qwen4_exp_text": INDEXER,
    "qwen4_exp": {"text_config": INDEXER},
    "reformer": {"is_decoder": True, "axial_pos_shape": [8, 16], "axial_pos_embds_dim": [16, 48], "num_buckets": 4},
    "xlstm": {"hidden_size": 64, "embedding_dim": 64, "num_heads": 4, "chunk_size": 8, "qk_dim_factor": 1.0},
    "xmod": {"default_language": "en_XX"},
    "zamba": {**ZAMBA, "attention_hidden_size": 128},
    "zamba2": {**ZAMBA, "head_dim": ..., "attention_head_dim": ..., "attention_hidden_size": ...},
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16},
}
ROTARY = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 3, 3]}
for _name in ("qwen2_vl", "qwen2_5_vl", "qwen2_5_omni_thinker", "glm4v", "glm46v", "glm_ocr", "glmga", "paddleocr_vl"):
    SPECIAL[_name] = {"text_config": {"rope_parameters": ROTARY}}
SPECIAL["paddleocr_vl"] = {"text_config": {"rope_parameters": ROTARY, "head_dim": 16}}
SPECIAL["chameleon"] = SPECIAL["emu3"] = {"vocabulary_map": {"<image>": 5}}
SPECIAL["longcat_flash"] = {"zero_expert_num": 2}
SPECIAL["step3p7"] = {"text_config": {"sliding_window": 16}}
DAVIT = {"embed_dim": [32, 32, 64, 64], "num_heads": [4] * 4, "num_groups": [4] * 4, "depths": [1] * 4}
SPECIAL["florence2"] = {"vision_config": {**DAVIT, "patch_size": [7, 3, 3, 3]}}
SPECIAL["marian"] = {"pad_token_id": 0, "decoder_start_token_id": 0}
SPECIAL["glm4v_moe"] = {"text_config": {"rope_parameters": {**ROTARY, "mrope_section": [1, 1, 2]}}}
# Rules of the run. The shared block of Zamba is refused otherwise: each of its places has inputs of its own.
RULES: dict[str, dict[str, Any]] = {"zamba": {r"-:.*shared_transf": {}}, "zamba2": {r"-:.*shared_transf": {}}}
DECODERS = [
    "bart",
    "bigbird_pegasus",
    "blenderbot",
    "blenderbot-small",
    "marian",
    "mbart",
    "mvp",
    "pegasus",
    "plbart",
    "trocr",
    "whisper",
]
# Why less than three quarters of the weights are quantized.
REASONS: dict[str, str] = {
    **dict.fromkeys(DECODERS, "a decoder alone never calls its cross-attention"),
    "blt": "its tower of patches and its decoder of bytes are lists of their own: name them",
    "dbrx": "its experts are 2-D parameters of one module",
    "gemma3n_text": "projections of its copies of the stream lie beside the blocks",
    "roc_bert": "a projection in its embeddings outweighs the tiny blocks",
    "zamba": "the blocks that it shares stay as they are",
    "zamba2": "the blocks that it shares stay as they are",
    "git": "the tower for pictures lies beside the blocks that read",
    "got_ocr2": "the tower for pictures lies beside the blocks that read",
    "phi4_multimodal": "the towers for pictures and sound lie beside the blocks that read",
    "t5gemma2": "the tower for pictures lies in the encoder",
    "xlnet": "its attention keeps the projections as 3-D parameters",
}
# No language models by themselves.
NOT_TRIED: dict[str, str] = {
    "gemma3n": "needs the package timm; gemma3n_text is its language model",
    "gemma4_assistant": "continues the hidden states of another model",
    "gemma4_unified_assistant": "continues the hidden states of another model",
    "shieldgemma2": "transformers does not load what it saves of it",
    "musicgen": "its decoder reads audio codes and is a part of another model",
    "musicgen_melody": "its decoder reads audio codes and is a part of another model",
}


def small(config: Any) -> dict[str, Any]:
    """Settings that make a model of the class of ``config``, which has its defaults, a small one."""
    found: dict[str, Any] = {}
    names = [*vars(config), *getattr(config, "attribute_map", {})]
    for name in names:
        value = vars(config).get(name)
        if hasattr(value, "to_dict"):
            found[name] = small(value)
        elif isinstance(value, dict) and "mrope_section" in value:  # parts of half a rotated head
            part = value.get("partial_rotary_factor", getattr(config, "partial_rotary_factor", None)) or 1
            found[name] = {**value, "mrope_section": [2, 3, 3] if part == 1 else [1, 1, 2]}
        elif name in SMALL and not isinstance(value, (bool, list, dict, str)):
            if value is not None or name not in DERIVED:
                found[name] = SMALL[name]
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type") and isinstance(value, list):
            kinds = [*dict.fromkeys(value)]
            found[name] = (kinds * 2)[: max(2, len(kinds))]
    layers = max((len(found[name]) for name in found if isinstance(found[name], list)), default=0)
    for name in found:
        if isinstance(found[name], list):
            found[name] = (found[name] * layers)[:layers]
        elif layers and name in ("num_hidden_layers", "n_layer", "num_layers"):
            found[name] = layers
    if "qk_rope_head_dim" in found:  # multi-head latent attention: keys as many as queries, rotated in part
        found |= {"num_key_value_heads": found["num_attention_heads"], "head_dim": found["qk_rope_head_dim"]}
    return found


def merged(one: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """``one`` with the settings of ``other``, of nested ones too; ``...`` removes one."""
    result = dict(one)
    for name, value in other.items():
        if value is ...:
            result.pop(name, None)
        elif isinstance(value, dict) and isinstance(result.get(name), dict):
            result[name] = merged(result[name], value)
        else:
            result[name] = value
    return result


def build(name: str, task: str = "causal") -> Any:
    """A small random model whose outputs depend on every weight."""
    import torch
    from transformers import AutoConfig

    auto, usual = auto_class(task), AutoConfig.for_model(name)
    settings = merged(small(usual), SPECIAL.get(name, {}))
    for key, value in settings.items():  # some classes take no dictionaries for those of their parts
        if isinstance(value, dict) and hasattr(part := getattr(usual, key), "to_dict"):
            settings[key] = type(part)(**value)
    config = type(usual)(**settings)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in auto.from_config(config).parameters())
    if size > LARGEST:
        raise ValueError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    model = auto.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.08)
    return model


def auto_class(task: str) -> Any:
    import transformers

    return getattr(transformers, TASKS[task][0])


def names_of(task: str) -> list[str]:
    """Model types that transformers has a class for."""
    from transformers.models.auto import modeling_auto

    return sorted(getattr(modeling_auto, TASKS[task][1]))
