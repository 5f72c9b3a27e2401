"""Every architecture in the table of docs/models.md, again."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

FOLDER = Path(__file__).parents[2] / "docs" / "benchmarks"
FOUND = json.loads((FOLDER / "architectures.json").read_text())["tasks"]
WORKING = [(task, name) for task, found in FOUND.items() for name, entry in found.items() if entry["result"] == "works"]


@pytest.mark.slow
@pytest.mark.parametrize(("task", "name"), WORKING)
def test_the_architecture_still_works(task: str, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(FOLDER)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    architectures = pytest.importorskip("architectures")
    if name not in sys.modules["small_models"].names_of(task):
        pytest.skip(f"this version of transformers has no {name}")
    entry = architectures.in_a_process(name, task)
    if entry["result"] == "not built":
        pytest.skip(entry["note"])
    assert entry["result"] == "works", entry


def test_every_low_share_in_the_table_has_a_reason() -> None:
    table = (FOLDER.parent / "models.md").read_text()
    assert "no reason known" not in table
    assert all(f"## {task}" in table for task in FOUND)
