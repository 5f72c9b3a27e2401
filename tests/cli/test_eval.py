"""The command ``eval`` as a user types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.cli.command import TEXT, error, run


def test_eval_refuses_a_reference_with_another_tokenizer(original: Path, quantized: Path, tmp_path: Path) -> None:
    other = shutil.copytree(original, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    command = ["eval", quantized, "--reference", other, "--text", TEXT, "--seqlen", "32", "--windows", "2"]
    assert "a reference must have the same tokenizer" in error(run(*command))
    for file in other.glob("*token*"):
        file.unlink()
    result = run(*command)  # nothing to compare with
    assert result.exit_code == 0, result.output


def test_eval_prints_a_table_of_what_it_measured(original: Path, quantized: Path) -> None:
    result = run("eval", quantized, "--reference", original, "--text", TEXT, "--seqlen", "32", "--windows", "3")
    assert result.exit_code == 0, result.output
    for words in ("3 windows of 32 tokens", "perplexity of the reference", "mean KL divergence", "99th percentile"):
        assert words in result.stdout
