"""``gptq-backend quantize --calibration auto``."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from gptq_transformers.auto_calibration import USER
from tests.cli.command import run


def test_the_command_reports_what_was_chosen_and_why(original: Path, tmp_path: Path, offline: None) -> None:
    text = tmp_path / "own.jsonl"
    text.write_text("\n".join(json.dumps({"text": f"line {i} of my own"}) for i in range(100)))
    command = ["quantize", original, tmp_path / "out", "--group-size", "32", "--samples", "8", "--seqlen", "32"]
    result = run(*command, "--calibration", "auto", "--text", text)
    assert result.exit_code == 0, result.output
    report = json.loads((tmp_path / "out" / "quantize_report.json").read_text())
    chosen = report["calibration"]["choice"]
    count = sum(source["chosen"] for source in chosen["sources"].values())
    assert len(chosen["curve"]) == count <= 8
    assert report["calibration"]["tokens"] == 32 * count
    assert chosen["summary"] in result.stderr.replace("\n", "")
    assert report["evaluation"]["windows"] == 4
    page = (tmp_path / "out" / "quantize_report.html").read_text()
    assert USER in page
    assert "held out" in page
    assert not re.search(r"https?://|<script|<link|@import|src=", page)


@pytest.mark.parametrize("calibration", [["--rtn"], ["--calibration", "some.txt"]])
def test_the_command_refuses_text_without_auto(original: Path, tmp_path: Path, calibration: list[str]) -> None:
    result = run("quantize", original, tmp_path / "out", "--text", "own.txt", *calibration)
    assert result.exit_code == 2
    assert "--calibration auto" in re.sub(r"[│\s]+", " ", result.output)
