"""Weights are held once, go when the engine goes, and can be loaded again while it lives."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.vllm.engine import Engine, EngineError

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
SAME = ["llama-4-32-sym", "llama-4-64-actorder", "phi3-4-32", "mixtral-4-32", "qwen3_moe-4-32"]
LLAMAS = ["llama-3-32-sym", "llama-4-32-asym-v2", "llama-4-64-actorder", "llama-dynamic"]


def expected(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and log-probabilities of what follows each."""
    file = load_file(CHECKPOINTS / f"{name}.expected.safetensors")
    return file["input_ids"][0], file["logits"][0].float().log_softmax(-1)[:-1]


def distance(engine: Engine, folder: str, name: str, **how: object) -> float:
    """Mean absolute difference of the log-probabilities of the engine that was loaded from ``folder``."""
    ids, wanted = expected(name)
    return float((engine.logprobs(CHECKPOINTS / folder, ids, **how) - wanted).abs().mean())


@pytest.fixture(scope="module")
def engine(start_engine: Callable[..., Engine]) -> Engine:
    return start_engine()


@pytest.mark.parametrize(
    "name", ["llama-4-32-sym", "llama-4-64-actorder", "phi3-4-32", "mixtral-4-32", "qwen3_moe-4-32"]
)
def test_the_same_weights_are_loaded_again(engine: Engine, name: str) -> None:
    before = distance(engine, name, name)
    assert before < 0.02
    for _ in range(2):
        assert distance(engine, name, name, reload={"path": None}) == before


@pytest.mark.parametrize("name", LLAMAS)
def test_weights_of_another_folder_and_form_are_loaded(engine: Engine, name: str) -> None:
    first = "llama-4-32-sym"
    assert distance(engine, first, first) < 0.02
    assert distance(engine, first, name, reload={"path": str(CHECKPOINTS / name)}) < 0.02
    assert distance(engine, first, first, reload={"path": str(CHECKPOINTS / first)}) < 0.02


@pytest.mark.parametrize("name", ["llama-4-64-actorder", "qwen3_moe-4-32"])
def test_quantized_weights_are_held_once(engine: Engine, name: str) -> None:
    distance(engine, name, name)
    assert engine.held is not None
    assert engine.held["packed"] > 50_000
    assert engine.held["reached"] <= 1.05 * engine.held["packed"]


def test_weights_go_with_their_engine(start_engine: Callable[..., Engine]) -> None:
    engine = start_engine()
    for name in ("llama-4-32-sym", "qwen3_moe-4-32", "llama-4-32-sym"):
        distance(engine, name, name)
        assert engine.left == 0, name


@pytest.mark.slow
def test_ranks_load_their_shares_again(start_engine: Callable[..., Engine]) -> None:
    engine = start_engine(ranks=2)
    for first, then in (("llama-4-64-actorder", "llama-4-32-sym"), ("qwen3_moe-4-32", "qwen3_moe-4-32")):
        assert distance(engine, first, first) < 0.02
        assert distance(engine, first, then, reload={"path": str(CHECKPOINTS / then)}) < 0.02


@pytest.mark.slow
def test_a_compiled_model_takes_weights_of_its_form_and_no_others(start_engine: Callable[..., Engine]) -> None:
    engine, name = start_engine(), "llama-4-64-actorder"
    before = distance(engine, name, name, enforce_eager=False)
    assert before < 0.02
    assert distance(engine, name, name, enforce_eager=False, reload={"path": None}) == before
    with pytest.raises(EngineError, match="another form than those before .* start vLLM anew"):
        distance(engine, name, name, enforce_eager=False, reload={"path": str(CHECKPOINTS / "llama-3-32-sym")})
