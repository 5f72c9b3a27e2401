"""Tiny models as ``.gguf`` files, written by the package gguf from random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

HEADS, KEYS = 4, 2


def write_gguf(file: Path, kind: str, embedding: str = "F16") -> None:
    """A Llama whose matrices are of type ``kind``; q and k are sorted for llama.cpp's way of rotating."""
    import gguf

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=256,
        num_hidden_layers=1,
        num_attention_heads=HEADS,
        num_key_value_heads=KEYS,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config)
    writer = gguf.GGUFWriter(str(file), "llama")
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(256)
    writer.add_block_count(1)
    writer.add_feed_forward_length(256)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KEYS)
    writer.add_layer_norm_rms_eps(1e-6)
    writer.add_vocab_size(64)
    names: Any = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 1)
    for name, parameter in model.named_parameters():
        values = parameter.detach().float().numpy()
        for called, heads in (("q_proj", HEADS), ("k_proj", KEYS)):
            if called in name:
                values = values.reshape(heads, 2, -1, values.shape[1]).swapaxes(1, 2).reshape(values.shape)
        wanted = "F32" if values.ndim == 1 else embedding if "embed" in name else kind
        type_ = gguf.GGMLQuantizationType[wanted]
        data = gguf.quants.quantize(np.ascontiguousarray(values), type_)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), data, raw_dtype=type_)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
