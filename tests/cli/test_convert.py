"""``gptq-backend convert``."""

from __future__ import annotations

import json
from pathlib import Path

from tests.cli.command import error, run

DATA = Path(__file__).parents[1] / "data"
FORMATS = DATA / "formats"


def test_an_exact_conversion_says_so(tmp_path: Path) -> None:
    result = run("convert", FORMATS / "awq-gemm", tmp_path / "out", "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    assert "7 layers in format gptq" in result.output
    assert "exact: all weights of the quantized layers are the same numbers" in result.output
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["exact"] is True
    assert report["largest_difference"] == 0
    assert len(report["differences"]) == 7


def test_a_rounded_one_says_how_much(tmp_path: Path) -> None:
    result = run("convert", FORMATS / "awq-gemm", tmp_path / "out", "--to", "bf16")
    assert result.exit_code == 0, result.output
    assert "largest difference of a weight 0.000" in result.output


def test_with_text_both_are_compared(tmp_path: Path) -> None:
    source = DATA / "checkpoints" / "llama-4-32-sym"
    text = DATA / "wikitext2-test-excerpt.txt"
    options = ["--to", "compressed-tensors", "--text", text, "--seqlen", "32", "--windows", "2"]
    result = run("convert", source, tmp_path / "out", *options, "--json", tmp_path / "report.json")
    assert result.exit_code == 0, result.output
    evaluation = json.loads((tmp_path / "report.json").read_text())["evaluation"]
    if evaluation is not None:  # the peer's folder has a tokenizer
        assert evaluation["kld"] < 1e-6


def test_a_format_that_cannot_hold_it_is_one_line(tmp_path: Path) -> None:
    result = run("convert", FORMATS / "ct-mixed", tmp_path / "out", "--to", "awq")
    assert "has 8 bits, expected what AWQ can hold" in error(result)
    assert not (tmp_path / "out").exists()


def test_an_embedding_that_the_format_cannot_hold_is_written_in_16_bits_on_request(tmp_path: Path) -> None:
    source = DATA / "checkpoints" / "llama-embed-both"
    assert "--embed-bits 16" in error(run("convert", source, tmp_path / "out", "--to", "compressed-tensors"))
    assert not (tmp_path / "out").exists()
    result = run("convert", source, tmp_path / "out", "--embed-bits", "16")
    assert result.exit_code == 0, result.output
    assert "model.embed_tokens.weight was rounded to 16 bits, largest difference 0.000" in result.output
