"""Measuring plans on a GPU: `make test-gpu`. What the host can check is in tests/kernels/test_cuda_plan_tables.py."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from gptq_backend import ConfigError
from gptq_backend.bench import Problem, plans
from gptq_backend.kernels.cuda import plan_tables
from gptq_backend.kernels.cuda.plan import Shape

pytestmark = pytest.mark.gpu


def test_what_was_measured_is_kept_and_serves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    device = torch.device("cuda", 0)
    try:
        layer = plans.Layer.random(Problem(1024, 512, dtype="fp16"), device)
        choices = list(plans.tune(layer, (1, 64), 0.002))
    except ConfigError as error:
        pytest.skip(str(error))
    assert [choice.rows for choice in choices] == [1, 64]
    assert all(choice.usual_seconds is not None for choice in choices)
    assert plan_tables.Kind.of(device).path.is_relative_to(tmp_path)
    for choice in choices:
        assert plan_tables.best_plan(choice.rows, Shape(4, 1024, 8), device) == choice.best
    plan_tables.forget()
