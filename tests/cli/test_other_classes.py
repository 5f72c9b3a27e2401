"""Commands and models that do not predict the next token."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("transformers")

from safetensors.torch import load_file
from transformers import LlamaConfig

from gptq_backend import GPTQError
from gptq_cli.models import load_model
from tests.cli.command import SMALL, TEXT, error, run
from tests.transformers.kinds import HEADS, KINDS, save


@pytest.mark.parametrize("name", ["Qwen3ForSequenceClassification", "BertForMaskedLM", "Qwen3Model"])
def test_figures_of_language_models_are_not_measured_of_others(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", name, KINDS[name][0]())
    with pytest.raises(GPTQError, match=f"is a {name}, which does not predict the next token"):
        load_model(source)


def test_a_classifier_is_quantized_by_the_command_without_a_comparison(original: Path, tmp_path: Path) -> None:
    config = LlamaConfig(**{**HEADS, "vocab_size": 259, "num_labels": 3})
    source = save(tmp_path / "source", "LlamaForSequenceClassification", config)
    for file in original.glob("tokenizer*"):
        (source / file.name).write_bytes(file.read_bytes())
    result = run("quantize", source, tmp_path / "out", *SMALL, "--calibration", TEXT)
    assert result.exit_code == 0, result.output
    assert "LlamaForSequenceClassification, which does not predict the next token" in " ".join(result.stderr.split())
    assert "KL divergence from" not in result.stdout
    assert "score.weight" in load_file(tmp_path / "out" / "model.safetensors")
    message = error(run("eval", tmp_path / "out", "--text", TEXT))
    assert "does not predict the next token" in message
