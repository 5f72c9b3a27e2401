"""Models of a few thousand weights, with tokens and positions by the test."""

from __future__ import annotations

from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM


def tiny_llama(seed: int = 0, spread: float = 0.2, **settings: Any) -> LlamaForCausalLM:
    """Weights of standard deviation ``spread``: more makes predictions that differ much between seeds."""
    torch.manual_seed(seed)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, "vocab_size": 64, "max_position_embeddings": 32, **settings}))
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=spread)
    return model.eval()
