"""Distillation of scales and norms: what may change, what must not, and that an interrupted run goes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gptq_backend import CalibrationError, QuantizeConfig, QuantLinear, quantize_model
from gptq_backend.distill import distill
from tests.toy import Toy, samples, toy


@pytest.fixture(scope="module")
def pair() -> tuple[Toy, Toy]:
    """A quantized model and its original."""
    teacher = toy(dtype=torch.float32)
    student = copy.deepcopy(teacher)
    quantize_model(student, QuantizeConfig(bits=2, group_size=16), samples(16))
    return student, teacher


def run(pair: tuple[Toy, Toy], **settings: Any) -> tuple[Toy, Any]:
    student = copy.deepcopy(pair[0])
    report = distill(student, pair[1], samples(16), **{"epochs": 4, "rate": 1e-2, "batch_size": 2, **settings})
    return student, report


def test_lowers_the_held_out_divergence_and_changes_only_scales_and_vectors(pair: tuple[Toy, Toy]) -> None:
    student, report = run(pair)
    assert report.kept
    assert report.after < 0.97 * report.before
    before, after = pair[0].state_dict(), student.state_dict()
    assert list(before) == list(after)
    for key in before:
        assert before[key].dtype == after[key].dtype, key
        changed = not torch.equal(before[key], after[key])
        assert changed == (key.endswith("scales") or "norm" in key), key
    assert all(type(m) is not nn.Linear for m in student.blocks.modules())


def test_what_is_reported_is_what_the_stored_model_does(pair: tuple[Toy, Toy]) -> None:
    student, report = run(pair)
    held_out = torch.stack(samples(16)[-2:])
    with torch.no_grad():
        target, found = (model(held_out).log_softmax(-1) for model in (pair[1], student))
    assert float((target.exp() * (target - found)).sum(-1).mean()) == pytest.approx(report.after, rel=1e-4)


def test_a_result_that_is_no_better_is_undone(pair: tuple[Toy, Toy], caplog: pytest.LogCaptureFixture) -> None:
    student, report = run(pair, rate=1.5)
    assert not report.kept
    assert "undone" in caplog.text
    before, after = pair[0].state_dict(), student.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_an_interrupted_run_goes_on_where_it_was(pair: tuple[Toy, Toy], tmp_path: Path) -> None:
    whole, _ = run(pair)
    file = tmp_path / "progress.pt"

    def interrupt(done: int, total: int, loss: float) -> None:
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pair, progress_file=file, on_step=interrupt)
    resumed, report = run(pair, progress_file=file)
    assert len(report.losses) == 4 * 7
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )
    assert not file.exists()
    with pytest.raises(KeyboardInterrupt):
        run(pair, progress_file=file, on_step=interrupt)
    with pytest.raises(CalibrationError, match="another run"):
        run(pair, progress_file=file, epochs=5)


def test_an_error_leaves_the_model_as_it_was(pair: tuple[Toy, Toy]) -> None:
    student = copy.deepcopy(pair[0])

    def fail(done: int, total: int, loss: float) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        distill(student, pair[1], samples(16), batch_size=2, on_step=fail)
    assert sum(isinstance(module, QuantLinear) for module in student.modules()) == 14
    before, after = pair[0].state_dict(), student.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [p.requires_grad for p in student.parameters()] == [p.requires_grad for p in pair[0].parameters()]


def test_one_batch_is_too_little(pair: tuple[Toy, Toy]) -> None:
    with pytest.raises(CalibrationError, match="holds one out"):
        distill(copy.deepcopy(pair[0]), pair[1], samples(2), batch_size=2)
