"""Seconds by phase: every one is counted once, and nobody pays who did not ask."""

from __future__ import annotations

import pytest
import torch

from gptq_backend import timing as phases

CPU = torch.device("cpu")


def test_phases_count_the_inner_one_and_the_time_outside_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(100))
    monkeypatch.setattr(phases.time, "perf_counter", lambda: next(clock))

    @phases.timed("inner")
    def inner() -> int:
        return 1

    @phases.timed("outer")
    def outer() -> int:
        return inner() + inner()

    assert outer() == 2  # nobody asked
    with phases.record(CPU) as recorder:
        outer()
    assert dict(recorder.seconds) == {"forward": 2, "outer": 3, "inner": 2}
    with phases.record(CPU) as recorder, pytest.raises(RuntimeError):
        phases.timed("failing")(lambda: (_ for _ in ()).throw(RuntimeError))()
    outer()
    assert "outer" not in recorder.seconds
