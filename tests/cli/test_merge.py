"""``merge``: the command's results, its comparison, and what it says of wrong input."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.cli.command import SMALL, TEXT, error, run
from tests.transformers.adapters import write_lora
from tests.transformers.checkpoints import load

pytest.importorskip("peft", reason="peft computes what an adapter adds; pip install peft")

WINDOWS = SMALL[2:]
LAYERS = [f"model.layers.{block}.self_attn.{kind}_proj" for block in (0, 1) for kind in "qv"]


@pytest.fixture(scope="module")
def adapter(quantized: Path) -> Path:
    folder = quantized.parent / "adapter"
    write_lora(folder, load(quantized), LAYERS, scale=0.001)
    return folder


@pytest.mark.parametrize("calibration", [TEXT, "auto", "none"])
def test_a_gptq_result_is_compared_with_the_adapter_on_top(
    quantized: Path, adapter: Path, tmp_path: Path, calibration: object
) -> None:
    arguments = (*WINDOWS, "--calibration", calibration, "--json", tmp_path / "result.json")
    result = run("merge", quantized, adapter, tmp_path / "out", *arguments)
    assert result.exit_code == 0, result.output
    assert "4 layers rounded again in" in result.stdout
    assert "KL divergence from the model with the adapter on top" in result.stdout
    assert "plain rounding" in result.stdout
    found = json.loads((tmp_path / "result.json").read_text())
    assert sorted(layer["name"] for layer in found["layers"]) == sorted(LAYERS)
    assert 0 < found["evaluation"]["kld"] < 0.1
    assert 0 < found["evaluation"]["plain_rounding"]["kld"] < 0.1
    assert 0 < found["evaluation"]["without_adapter"]["kld"] < 0.1
    assert run("inspect", tmp_path / "out").exit_code == 0


def test_a_dense_result_has_no_plain_rounding(quantized: Path, adapter: Path, tmp_path: Path) -> None:
    result = run("merge", quantized, adapter, tmp_path / "out", *WINDOWS, "--to", "bf16", "--json", "-")
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    assert (found["layers"], found["calibration"]) == ([], None)
    assert found["evaluation"]["plain_rounding"] is None
    assert found["evaluation"]["kld"] < 1e-3
    assert error(run("inspect", tmp_path / "out"))


def test_wrong_input_is_one_line_and_nothing_is_written(quantized: Path, original: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert "expected that of an adapter" in error(run("merge", quantized, tmp_path / "none", out))
    write_lora(tmp_path / "adapter", load(quantized), LAYERS)
    assert "is not quantized; merge the adapter with peft" in error(run("merge", original, tmp_path / "adapter", out))
    assert "is or holds the adapter" in error(run("merge", quantized, tmp_path / "adapter", tmp_path))
    usage = run("merge", quantized, tmp_path / "adapter", out, "--calibration", TEXT, "--text", TEXT)
    assert usage.exit_code == 2
    assert "--text goes with --calibration auto or none" in usage.output
    assert not out.exists()
