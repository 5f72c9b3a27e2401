"""A model of enough blocks to be interrupted in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model of many blocks, and a tokenizer of its vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from tests.cli.command import CHECKPOINTS

    folder = tmp_path_factory.mktemp("ranks") / "deep"
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 576, "num_hidden_layers": 20, "max_position_embeddings": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=259, **sizes, **heads)).to(torch.bfloat16).save_pretrained(folder)
    file = str(CHECKPOINTS / "llama-4-32-sym" / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file).save_pretrained(folder)
    return folder
