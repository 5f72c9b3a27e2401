"""The time left: by what this run has quantized, never by what an earlier one had."""

from __future__ import annotations

import pytest

from gptq_cli import run_progress
from gptq_cli.run_progress import Pace


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(run_progress.time, "perf_counter", lambda: now[0])
    return now


def test_restored_blocks_say_nothing_about_the_time_left(clock: list[float]) -> None:
    pace = Pace()
    for _ in range(3):
        pace.begin_block()
        clock[0] += 1
        pace.restored()
        for _ in range(4):
            pace.layer()
        pace.end_block()
    assert pace.left(8) is None
    pace.begin_block()
    assert pace.left(8) is None
    for _ in range(2):
        clock[0] += 5
        pace.layer()
    assert pace.left(6) == 30
    for _ in range(2):
        clock[0] += 5
        pace.layer()
    clock[0] += 20  # its training
    pace.end_block()
    assert pace.left(4) == 40


def test_a_block_under_way_counts_as_far_as_it_is(clock: list[float]) -> None:
    pace = Pace()
    pace.begin_block()
    for _ in range(4):
        clock[0] += 10
        pace.layer()
    pace.begin_block()  # which ends the one before
    clock[0] += 25
    pace.layer()
    assert pace.left(3) == 15
    clock[0] += 100
    assert pace.left(3) == 0
