"""Quantized embeddings in vLLM: rows from packed words, and a head that multiplies with the same ones."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptq_backend import QuantizeConfig
from gptq_transformers import quantize
from tests.transformers.checkpoints import ids, load, logits, tiny
from tests.vllm.engine import Engine
from tests.vllm.test_offline import BOUND, distance

KINDS = [("llama", True), ("llama", False), ("qwen3", True), ("gemma3", True)]


def written(folder: Path, kind: str, tied: bool, bits: int) -> Tensor:
    """Quantizes a tiny model to ``folder`` and returns its logits."""
    changes = {"vocab_size": 288} if bits in (5, 6, 7) else {}  # planes hold whole runs of 32
    model = tiny(kind, tie_word_embeddings=tied, **changes).to(torch.bfloat16)
    quantize(model, QuantizeConfig(bits=4, group_size=32, embed_bits=bits, quality="fast"), None)
    model.save_pretrained(folder)
    return logits(load(folder))[0]


@pytest.mark.parametrize("bits", [8, *(pytest.param(bits, marks=pytest.mark.slow) for bits in (4, 6))])
@pytest.mark.parametrize(
    ("kind", "tied"), [each if each[0] == "llama" else pytest.param(*each, marks=pytest.mark.slow) for each in KINDS]
)
def test_a_quantized_embedding_gives_the_right_logprobs(
    engine: Engine, kind: str, tied: bool, bits: int, tmp_path: Path
) -> None:
    expected = written(tmp_path / "model", kind, tied, bits)
    assert distance(engine.logprobs(tmp_path / "model", ids()[0]), expected) < BOUND


@pytest.mark.slow
@pytest.mark.parametrize("tied", [True, False])
def test_two_ranks_share_the_vocabulary(engine: Engine, pair: Engine, tied: bool, tmp_path: Path) -> None:
    expected = written(tmp_path / "model", "llama", tied, 8)
    assert distance(pair.logprobs(tmp_path / "model", ids()[0]), expected) < BOUND
