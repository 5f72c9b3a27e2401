"""The command ``doctor`` as a user types it, and what it says of kernels that lie, crash and hang."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("typer")

from gptq_backend import KERNELS
from gptq_cli.doctor_command import examine, lines, versions
from tests.cli.command import run

KINDS = 16


def test_every_kernel_is_right_or_says_why_and_a_line_to_paste_follows(tmp_path: Path) -> None:
    done = run("doctor", "--device", "cpu", "--json", tmp_path / "found.json")
    assert done.exit_code == 0, done.output
    found = json.loads((tmp_path / "found.json").read_text())
    assert [row["row"] for row in found["rows"]] == [kernel.name for kernel in KERNELS]
    for row in found["rows"]:
        assert row["right"] == KINDS or row["refused"]
        assert not row["wrong"]
    assert found["rows"][-1]["right"] == KINDS
    *table, report = done.stdout.strip().splitlines()
    assert table[0].startswith("kernel")
    assert report.startswith("report: gptq-backend ")
    assert f"reference on cpu: {KINDS} right" in report


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("lies", "wrong results (2 bits, symmetric, act-order; and 14 more)"),
        ("says NaN", "wrong results (2 bits, symmetric, act-order; and 14 more)"),
        (
            "raises",
            "RuntimeError: an illegal access was encountered (2 bits, symmetric, act-order; and 14 more)",
        ),
        ("crashes", "it crashed with SIGSEGV (2 bits, symmetric, act-order)"),
        ("ends", "it ended with exit code 3 (2 bits, symmetric, act-order)"),
        ("hangs", "it did not end within 15 s (2 bits, symmetric, act-order)"),
    ],
)
def test_bad_kernels_are_told_from_good_ones(kind: str, message: str) -> None:
    row = examine("bad", "cpu", 15 if kind == "hangs" else 120, (sys.executable, "-m", "tests.cli.bad_rows", kind))
    assert row["right"] == 1
    assert row["wrong"][0] == message
    report = [*lines({"versions": versions(), "rows": [row]})][-1]
    assert message in report
    assert "\n" not in report


def test_a_device_that_is_none_is_an_error_in_a_sentence() -> None:
    done = run("doctor", "--device", "cuda:99")
    assert done.exit_code == 1
    assert done.stderr.startswith("error: device 'cuda:99' cannot be used here")
