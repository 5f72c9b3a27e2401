"""Checkpoints of AWQ, AutoRound, compressed-tensors and Marlin, as their own tools wrote them, in vLLM."""

from __future__ import annotations

from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.vllm.engine import Engine
from tests.vllm.test_offline import BOUND, distance

FORMATS = Path(__file__).parents[1] / "data" / "formats"
NAMES = sorted(path.name for path in FORMATS.iterdir() if (path / "config.json").is_file())
BY_THEMSELVES = [name for name in NAMES if name.startswith(("awq", "ct-w4a16-actorder", "auto-round-asym"))]


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_of_another_tool_gives_its_logprobs(engine: Engine, name: str) -> None:
    expected = load_file(FORMATS / f"{name}.expected.safetensors")
    found = engine.logprobs(FORMATS / name, expected["input_ids"][0])
    assert distance(found, expected["logits"][0]) < BOUND
    assert "Quantized layers by kernel of gptq-backend: " in engine.text()


@pytest.mark.parametrize("name", BY_THEMSELVES)
def test_on_a_cpu_nobody_has_to_ask_for_it(engine: Engine, name: str) -> None:
    expected = load_file(FORMATS / f"{name}.expected.safetensors")
    found = engine.logprobs(FORMATS / name, expected["input_ids"][0], quantization=None)
    assert distance(found, expected["logits"][0]) < BOUND
    assert "gptq-backend serves this checkpoint of " in engine.text()
