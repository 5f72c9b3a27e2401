"""Distillation of scales and norms: what may change, what must not, and that an interrupted run goes on."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from gptq_backend import CalibrationError, ConfigError, QuantizeConfig, QuantLinear, quantize_model
from gptq_backend.calibration import make_batches
from gptq_backend.distill import distill, hold_out
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


@pytest.mark.parametrize("other", ["weights", "data", "rate", "epochs"])
def test_the_progress_of_another_run_is_not_taken(
    pair: tuple[Toy, Toy], tmp_path: Path, caplog: pytest.LogCaptureFixture, other: str
) -> None:
    file = tmp_path / "progress.pt"

    def interrupt(done: int, total: int, loss: float) -> None:
        if done == 9:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        run(pair, progress_file=file, on_step=interrupt)
    partial = tmp_path / "progress.pt.partial"
    partial.write_bytes(b"left by a run that was killed")
    student = copy.deepcopy(pair[0])
    data, settings = samples(16), {"epochs": 4, "rate": 1e-2}
    if other == "weights":
        next(m for m in student.modules() if isinstance(m, QuantLinear)).scales.data.mul_(1.01)
    elif other == "data":
        data = samples(16, seed=7)
    else:
        settings[other] = {"rate": 2e-2, "epochs": 3}[other]
    seen: list[int] = []
    distill(student, pair[1], data, batch_size=2, progress_file=file, on_step=lambda *s: seen.append(s[0]), **settings)  # type: ignore[arg-type]
    assert seen[0] == 1
    assert "starting over" in caplog.text
    assert not list(tmp_path.iterdir())


def test_the_judges_are_not_the_shortest_batches(pair: tuple[Toy, Toy]) -> None:
    data = [sample[:length] for length, sample in zip(range(8, 24), samples(16), strict=True)]
    batches, held_out = hold_out(make_batches(data, 1))
    assert [batch["input_ids"].shape[1] for batch in held_out] == [16, 8]
    assert sorted(batch["input_ids"].shape[1] for batch in batches) == [*range(9, 16), *range(17, 24)]


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

    distill(student, pair[1], samples(16), epochs=4, rate=1.5, batch_size=2, on_step=look)
    assert -1 < min(least) < -0.5, "the rate is too small for this test"


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


def test_a_directory_in_place_of_the_progress_is_found_before_the_work(pair: tuple[Toy, Toy], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory"):
        run(pair, progress_file=tmp_path, on_step=lambda *_: pytest.fail("started"))


@pytest.mark.parametrize("content", ["empty", "text", "cut", "tensors", "other keys", "other types"])
def test_a_file_that_is_no_progress_is_refused_before_the_work_and_kept(
    pair: tuple[Toy, Toy], tmp_path: Path, content: str
) -> None:
    file = tmp_path / "out.distill"
    if content in ("empty", "text"):
        file.write_bytes({"empty": b"", "text": b"my notes"}[content])
    elif content == "cut":
        torch.save({"changes": [torch.zeros(1000)], "optimizer": {}, "digest": "", "losses": []}, file)
        file.write_bytes(file.read_bytes()[:2000])
    else:
        other = {"tensors": torch.zeros(3), "other keys": {"digest": "mine"}, "other types": Path("x")}
        torch.save(other[content], file)
    before = file.read_bytes()
    config = QuantizeConfig(group_size=16, distill_epochs=1)
    options: dict[str, Any] = {"teacher": lambda: pair[1], "batch_size": 2, "progress_file": file}
    with pytest.raises(ConfigError, match="is not the progress of a distillation") as caught:
        quantize_model(toy(), config, samples(4), on_layer=lambda *_: pytest.fail("started"), **options)
    assert "\n" not in str(caught.value)
    with pytest.raises(ConfigError, match="move it away"):
        run(pair, progress_file=file, on_step=lambda *_: pytest.fail("started"))
    assert file.read_bytes() == before
