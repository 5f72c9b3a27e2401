"""However a run is interrupted: OUT is old or new, the next run gives the same bits, and nothing is left over."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="runs are forked")


def interrupt(target: Path, *options: object) -> list[dict]:
    command = [sys.executable, str(ROOT / "docs/benchmarks/interruptions.py"), "--json", str(target)]
    path = os.pathsep.join([str(ROOT), str(ROOT / "integrations"), *sys.path[1:]])
    done = subprocess.run(
        [*command, *map(str, options)], capture_output=True, text=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert done.returncode == 0, done.stdout[-5000:] + done.stderr[-3000:]
    result = json.loads(target.read_text())
    assert result["wrong"] == []
    assert all(row["same_bits"] == row["moments"] for row in result["rows"])
    return result["rows"]


def test_interrupted_runs_leave_the_old_checkpoint_or_the_new_one(tmp_path: Path) -> None:
    rows = interrupt(tmp_path / "x.json", "--moments", 4, "--disks", "normal", "--tiers", "fast", "--seed", 3)
    assert {row["signal"] for row in rows} == {"kill -9", "Ctrl-C", "SIGTERM", "SIGHUP"}
    assert sum(row["interrupted"] for row in rows) > 0


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_interrupted_runs_of_every_tier_lose_nothing_on_any_disk(tmp_path: Path) -> None:
    disks = ["normal", "no swap", *(["full"] if os.geteuid() == 0 else [])]
    rows = interrupt(tmp_path / "x.json", "--moments", 32, "--disks", *disks, "--seed", 4)
    assert sum(row["old"] for row in rows) > 0 < sum(row["new"] for row in rows)
