"""A rank that dies ends the others, and the run goes on from there with any number of ranks, to the same bits."""

from __future__ import annotations

import random
import signal
import subprocess
import time
from pathlib import Path

import pytest
import torch

from tests.distributed.commands import SETTINGS, start, torchrun

pytest.importorskip("transformers")
psutil = pytest.importorskip("psutil")

SECONDS = 20  # in which all have ended
pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")


def begin(model: Path, out: Path, ranks: int) -> subprocess.Popen[str]:
    return start(*torchrun(ranks), "gptq_cli", "quantize", model, out, *SETTINGS)


def finish(process: subprocess.Popen[str]) -> str:
    _, told = process.communicate(timeout=300)
    assert process.returncode == 0, told[-5000:]
    return told


def kill_one(process: subprocess.Popen[str], after: float, number: int) -> str:
    """Kill a rank after so many seconds -> what was told, of a run that was not over by then; "" of one that was."""
    time.sleep(after)
    ranks = sorted(psutil.Process(process.pid).children(), key=lambda each: each.pid) if process.poll() is None else []
    if not ranks:
        process.communicate(timeout=300)
        return ""
    victim = ranks[number % len(ranks)]
    victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    _, told = process.communicate(timeout=60)
    assert time.monotonic() - killed < SECONDS
    assert not any(rank.is_running() for rank in ranks)
    return told if process.returncode else ""


def die_and_go_on(model: Path, folder: Path, moments: int, seed: int) -> None:
    """Kill runs at random moments; after each, another number of ranks ends it."""
    draw = random.Random(seed)
    start = time.monotonic()
    finish(begin(model, folder / "whole", 2))
    length = time.monotonic() - start
    expected = (folder / "whole" / "model.safetensors").read_bytes()
    for moment in range(moments):
        ranks, out = draw.choice([2, 3]), folder / str(moment)
        told = kill_one(begin(model, out, ranks), draw.uniform(0.3, 1) * length, draw.randrange(ranks))
        lines = [line for line in told.splitlines() if line.startswith("error:")]
        assert len(lines) <= 1, told
        if not out.exists():
            finish(begin(model, out, 5 - ranks))
        assert (out / "model.safetensors").read_bytes() == expected
        assert not out.with_name(f"{out.name}.progress").exists()


@pytest.mark.timeout(600)
def test_a_run_whose_rank_was_killed_goes_on_with_more_or_fewer_ranks(deep: Path, tmp_path: Path) -> None:
    die_and_go_on(deep, tmp_path, 1, seed=1)


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_ranks_killed_at_ten_moments_lose_nothing(deep: Path, tmp_path: Path) -> None:
    die_and_go_on(deep, tmp_path, 10, seed=2)
