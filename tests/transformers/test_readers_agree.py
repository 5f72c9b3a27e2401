"""``inspect``, ``from_pretrained`` and ``from_quantized`` agree on every damaged checkpoint, in one sentence each."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")

import torch
from transformers import AutoModelForCausalLM

from gptq_backend import GPTQError
from gptq_cli.checkpoint import read_checkpoint
from gptq_transformers import from_quantized
from tests.transformers.checkpoints import PEERS
from tests.transformers.mutations import mutated

BASES = ["llama-4-64-actorder", "qwen2-4-64", "llama-dynamic"]


def inspect(folder: Path) -> str:
    """What is wrong, or nothing."""
    try:
        damaged = read_checkpoint(folder).damaged
    except GPTQError as error:
        return str(error)
    return next(iter(damaged.values()), "")


def load(loader: object, folder: Path) -> str:
    try:
        loader(folder, dtype=torch.float32)  # type: ignore[operator]
    except GPTQError as error:
        return str(error)
    return ""


def visible(folder: Path) -> bool:
    """Whether plain from_pretrained sees a GPTQ checkpoint, and transformers itself has nothing to complain about."""
    try:
        content = json.loads((folder / "config.json").read_text())
        return content["quantization_config"]["quant_method"] == "gptq"
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


@pytest.mark.parametrize("seed", range(110))
def test_readers_agree_on_a_damaged_checkpoint(seed: int, tmp_path: Path) -> None:
    folder = tmp_path / "damaged"
    what = mutated(PEERS / BASES[seed % len(BASES)], folder, seed)
    found, loaded = inspect(folder), load(from_quantized, folder)
    assert bool(found) == bool(loaded), f"{what}: inspect says {found!r}, from_quantized {loaded!r}"
    for sentence in (found, loaded):
        assert "\n" not in sentence, what
        assert len(sentence) < 1000, what
    if not visible(folder):
        return
    try:
        plain = load(AutoModelForCausalLM.from_pretrained, folder)
    except Exception as error:  # transformers' own complaint: ours names it
        plain = str(error)
        assert found, f"{what}: from_pretrained says {plain!r}, inspect nothing"
    assert bool(plain) == bool(found), f"{what}: inspect says {found!r}, from_pretrained {plain!r}"
