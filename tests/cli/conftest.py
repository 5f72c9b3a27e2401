"""A tiny model, and what the command makes of it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model and a tokenizer of its vocabulary."""
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    from tests.cli.command import CHECKPOINTS

    folder = tmp_path_factory.mktemp("cli") / "original"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(folder)
    # Not AutoTokenizer: the folder names a class of transformers 5, which 4.x does not have.
    file = str(CHECKPOINTS / "llama-4-32-sym" / "tokenizer.json")
    PreTrainedTokenizerFast(tokenizer_file=file).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def quantized(original: Path) -> Path:
    """``original``, quantized by the command, and beside it what the command printed as JSON."""
    from tests.cli.command import SMALL, TEXT, run

    out = original.parent / "quantized"
    result = run("quantize", original, out, *SMALL, "--calibration", TEXT, "--json", original.parent / "result.json")
    assert result.exit_code == 0, result.output
    return out


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("something asked the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
