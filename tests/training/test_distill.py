"""Distillation of scales and norms: what may change, what must not, and that an interrupted run goes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gptq_backend import CalibrationError, QuantizeConfig, QuantLinear, quantize_model
from gptq_backend.model.calibration import make_batches
from gptq_backend.model.progress import Progress
from gptq_backend.model.structure import replace_module
from gptq_backend.training import scales as training
from gptq_backend.training.distill import distill
from gptq_backend.training.scales import schedule, validation_batches
from tests.toy import Toy, samples, toy


@pytest.fixture(scope="module")
def pair() -> tuple[Toy, Toy]:
    """A quantized model and its original."""
    teacher = toy(dtype=torch.float32)
    student = copy.deepcopy(teacher)
    config = QuantizeConfig(bits=2, group_size=16, correct_drift=False)  # which leaves more to be learnt
    quantize_model(student, config, samples(16))
    return student, teacher


def run(pair: tuple[Toy, Toy], **settings: Any) -> tuple[Toy, Any]:
    student = copy.deepcopy(pair[0])
    report = distill(student, pair[1], make_batches(samples(16), 2), **{"epochs": 4, "rate": 1e-2, **settings})
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
    whole, expected = run(pair)
    seen: list[int] = []

    def interrupt(done: int, total: int, loss: float) -> None:
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pair, progress=Progress(tmp_path / "p"), on_step=interrupt)
    resumed, report = run(pair, progress=Progress(tmp_path / "p"), on_step=lambda *step: seen.append(step[0]))
    assert seen == [*range(17, 29)], "the state of every eighth step is kept"
    assert report == expected
    assert all(
        torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True)
    )


@pytest.mark.parametrize("other", ["weights", "data", "rate", "epochs"])
def test_the_progress_of_another_run_is_not_taken(
    pair: tuple[Toy, Toy], tmp_path: Path, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    def interrupt(done: int, total: int, loss: float) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pair, progress=Progress(tmp_path), on_step=interrupt)
    student = copy.deepcopy(pair[0])
    data, settings = samples(16), {"epochs": 4, "rate": 1e-2}
    if other == "weights":
        next(m for m in student.modules() if isinstance(m, QuantLinear)).scales.data.mul_(1.01)
    elif other == "data":
        data = samples(16, seed=7)
    else:
        settings[other] = {"rate": 2e-2, "epochs": 3}[other]
    seen: list[int] = []
    options: dict[str, Any] = {"progress": Progress(tmp_path), **settings}
    distill(student, pair[1], make_batches(data, 2), on_step=lambda *step: seen.append(step[0]), **options)
    assert seen[0] == 1
    assert "starting over" in caplog.text


def test_a_layer_without_a_gradient_does_not_end_a_resumed_run(pair: tuple[Toy, Toy], tmp_path: Path) -> None:
    """Adam has no moments of it."""
    student = copy.deepcopy(pair[0])
    student.unused = copy.deepcopy(student.blocks[0])

    def interrupt(done: int, total: int, loss: float) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run((student, pair[1]), progress=Progress(tmp_path), on_step=interrupt)
    assert len(run((student, pair[1]), progress=Progress(tmp_path))[1].losses) == 4 * 7


def test_the_validation_batches_are_not_the_shortest() -> None:
    assert validation_batches(16) == [7, 15]
    assert validation_batches(5) == [4]
    assert sorted(schedule(16, 2)) == sorted(2 * [*range(7), *range(8, 15)])


def test_neither_no_grad_nor_a_training_teacher_in_16_bits_matters(pair: tuple[Toy, Toy]) -> None:
    """A teacher in train mode has dropout; one in 16 bits on a CPU is emulated, and noisier than it need be."""
    teacher = copy.deepcopy(pair[1]).bfloat16()
    exact = copy.deepcopy(teacher).float()
    teacher.norm = nn.Sequential(teacher.norm, nn.Dropout(0.9))  # type: ignore[assignment]
    teacher.train()
    with torch.no_grad():
        _, found = run((pair[0], teacher))
    _, expected = run((pair[0], exact))
    assert found.losses == expected.losses
    assert all(module.training for module in teacher.modules())
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.bfloat16}


def test_no_scale_changes_its_sign(pair: tuple[Toy, Toy]) -> None:
    student, least = copy.deepcopy(pair[0]), []

    def look(done: int, total: int, loss: float) -> None:
        least.append(min(float(p.detach().min()) for name, p in student.named_parameters() if name.endswith("change")))

    distill(student, pair[1], make_batches(samples(16), 2), epochs=4, rate=1.5, on_step=look)
    assert -1 < min(least) < -0.5, "the rate is too small for this test"


def test_an_error_leaves_the_model_as_it_was(pair: tuple[Toy, Toy]) -> None:
    student = copy.deepcopy(pair[0])

    def fail(done: int, total: int, loss: float) -> None:
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        distill(student, pair[1], make_batches(samples(16), 2), on_step=fail)
    assert sum(isinstance(module, QuantLinear) for module in student.modules()) == 14
    before, after = pair[0].state_dict(), student.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [p.requires_grad for p in student.parameters()] == [p.requires_grad for p in pair[0].parameters()]


def test_an_error_while_the_training_is_set_up_leaves_the_model_as_it_was(
    pair: tuple[Toy, Toy], monkeypatch: pytest.MonkeyPatch
) -> None:
    student = copy.deepcopy(pair[0]).to(torch.bfloat16)
    before = {key: tensor.clone() for key, tensor in student.state_dict().items()}
    gradients = [parameter.requires_grad for parameter in student.parameters()]
    replaced = []

    def fail(model: nn.Module, name: str, module: nn.Module) -> None:
        if len(replaced) == 3:
            replaced.append(name)
            raise RuntimeError("out of memory")
        replaced.append(name)
        replace_module(model, name, module)

    monkeypatch.setattr(training, "replace_module", fail)
    with pytest.raises(RuntimeError, match="out of memory"):
        distill(student, pair[1], make_batches(samples(16), 2))
    assert len(replaced) > 4, "nothing was put back"
    assert sum(isinstance(module, QuantLinear) for module in student.modules()) == 14
    after = student.state_dict()
    assert {key: tensor.dtype for key, tensor in after.items()} == {key: t.dtype for key, t in before.items()}
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert [parameter.requires_grad for parameter in student.parameters()] == gradients


def test_one_batch_is_too_little(pair: tuple[Toy, Toy]) -> None:
    with pytest.raises(CalibrationError, match="at least two calibration batches"):
        distill(copy.deepcopy(pair[0]), pair[1], make_batches(samples(2), 2))
