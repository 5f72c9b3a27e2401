"""``quantize --target-size`` and ``--target-bits`` as a user types them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from tests.cli.command import SMALL, TEXT, error, run

FAST = [*SMALL, "--quality", "fast", "--calibration", TEXT]


def test_the_files_fit_into_the_size_and_the_report_says_what_was_chosen(original: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    result = run("quantize", original, out, *FAST, "--target-size", "95KB")
    assert result.exit_code == 0, result.output
    report = json.loads((out / "quantize_report.json").read_text())
    budget = report["budget"]
    assert report["bytes_after"] == pytest.approx(budget["nbytes"], rel=0.005)
    assert report["bytes_after"] <= 95_000
    sizes = {layer["name"]: (layer["bits"], layer["group_size"]) for layer in report["layers"]}
    for group in budget["groups"]:
        assert {sizes[name] for name in group["layers"]} == {(group["bits"], group["group_size"])}
    line = next(line for line in result.stdout.splitlines() if line.startswith("budget of 95000 bytes"))
    assert re.search(r"predicted KL divergence 0\.\d+, measured 0\.\d+$", line)
    assert "sensitivity" in result.stderr
    assert AutoModelForCausalLM.from_pretrained(out).config.quantization_config.dynamic


def test_the_page_draws_the_bits_of_each_layer_and_the_sizes_that_others_would_get(
    original: Path, tmp_path: Path
) -> None:
    result = run("quantize", original, tmp_path / "out", *FAST, "--target-bits", "3.6", "--json", "-")
    report = json.loads(result.stdout)
    assert report["budget"]["layer_bits"] <= 3.6
    assert report["budget"]["embed_bits"] == 16
    page = (tmp_path / "out" / "quantize_report.html").read_text()
    assert "<h2>Budget</h2>" in page
    assert page.count("<circle") == 1
    tips = re.findall(r"<title>([^:<]+): (\d) bits, groups of (\d+), predicted divergence", page)
    assert len(tips) == len(report["budget"]["groups"]) == 8
    assert not re.search(r"https?://|<script|<link|@import|src=", page)
    assert "3.60 bits" in page or f"{report['budget']['layer_bits']:.2f} bits" in page


def test_a_budget_that_cannot_be_met_says_what_can(original: Path, tmp_path: Path) -> None:
    result = run("quantize", original, tmp_path / "out", *FAST, "--target-size", "10KB")
    assert result.exit_code == 1
    last = result.stderr.strip().splitlines()[-1]
    found = re.fullmatch(r"error: a budget of 10000 bytes cannot be met: .* (\d+) bytes at least; ask for more", last)
    assert found
    assert not (tmp_path / "out").exists()
    again = run("quantize", original, tmp_path / "out", *FAST, "--target-size", found[1])
    assert again.exit_code == 0, again.output
    assert "sensitivity" not in again.stderr  # kept from before
    assert not (tmp_path / "out.progress").exists()


@pytest.mark.parametrize("size", ["800MX", "much", "-3MB", "0"])
def test_a_size_that_makes_no_sense_is_an_error_before_the_work(original: Path, tmp_path: Path, size: str) -> None:
    result = run("quantize", original, tmp_path / "out", *FAST, "--target-size", size)
    assert f"target_size='{size}' is not a size" in error(result)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--calibration", TEXT, "--target-size", "1MB", "--target-bits", "4"], "exclude each other"),
        (["--rtn", "--target-bits", "4"], "--rtn has none"),
        (["--calibration", TEXT, "--target-bits", "four"], "unable to parse"),
    ],
)
def test_options_that_do_not_go_together_are_wrong_usage(
    original: Path, tmp_path: Path, options: list[str], message: str
) -> None:
    result = run("quantize", original, tmp_path / "out", *options)
    assert result.exit_code == 2
    assert message in re.sub(r"[\s│]+", " ", result.stderr)
