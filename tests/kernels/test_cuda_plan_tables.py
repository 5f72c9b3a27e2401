"""Measured plans of the CUDA kernels: how they are found, kept and looked up, without a GPU."""

from __future__ import annotations

import json
import logging
import os
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch

from gptq_backend import ConfigError
from gptq_backend.bench import Problem, plans
from gptq_backend.kernels.cuda import operators as cuda
from gptq_backend.kernels.cuda import plan_tables
from gptq_backend.kernels.cuda.plan import Gpu, Plan, Shape, candidates, fits, gpu, plan
from gptq_backend.kernels.cuda.plan_tables import Kind, best_plan
from gptq_backend.locks import claim
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import prepared

CPU = torch.device("cpu")  # stands for the emulator's device
SHAPE = Shape(4, 64, 4)
A100 = Gpu(108, 163 << 10, (8, 0))
GPU = Kind("NVIDIA A100-SXM4-80GB", "8.0", 108, 163 << 10)
TABLE: plan_tables.Table = {SHAPE: {1: Plan(1, 1, 2), 16: Plan(2, 2, 4), 256: None, 64: Plan(0, 4)}}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    plan_tables.forget()
    yield tmp_path
    plan_tables.forget()


# -- what can be chosen ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 16, 17, 64, 128, 300])
@pytest.mark.parametrize("tiles", [1, 5, 64, 172])
@pytest.mark.parametrize("shared", [64 << 10, 227 << 10])
def test_the_usual_plan_fits_and_so_does_all_that_is_tried(rows: int, tiles: int, bits: int, shared: int) -> None:
    tried = candidates(rows, tiles, bits, shared)
    assert None in tried
    assert len(set(tried)) == len(tried)
    assert all(fits(how, tiles, bits, shared) for how in tried)
    assert fits(plan(rows, 4096, tiles, bits, A100._replace(shared_bytes=shared)), tiles, bits, shared)


@pytest.mark.parametrize(
    "how",
    [
        Plan(3, 1),
        Plan(1, 4),
        Plan(1, 1, 0),
        Plan(2, 2, 16),
        Plan(1, 1, 8, splits=2),
        Plan(0, 1),
        Plan(0, 8, 4),
        Plan(0, 4, splits=0),
        Plan(0, 4, splits=17),
        Plan(0, 2, splits=2),  # of four tiles
    ],
)
def test_plans_without_a_kernel_do_not_fit(how: Plan) -> None:
    assert not fits(how, 4 if how.splits == 2 else 172, 4, 227 << 10)


def test_a_plan_that_needs_more_shared_memory_than_there_is_does_not_fit() -> None:
    assert fits(Plan(0, 8), 64, 8, 227 << 10)
    assert not fits(Plan(0, 8), 64, 8, 64 << 10)


# -- the choice --------------------------------------------------------------------------------------------------------


def measured(seconds: dict[Plan | None, float], usual: float = 1.0) -> plans.Measure:
    """A clock on which every plan takes ``usual``, but for those in ``seconds``; NaN for those that fail."""

    def measure(tried: Sequence[Plan | None]) -> tuple[dict[Plan | None, float], dict[Plan | None, str]]:
        times = {how: seconds.get(how, usual) for how in tried}
        right = {how: time for how, time in times.items() if time == time}
        return right, {how: "RuntimeError: no" for how in times if how not in right}

    return measure


def test_the_fastest_plan_is_chosen() -> None:
    choice = plans.choose(8, SHAPE, A100, measured({Plan(2, 1, 4): 0.5, Plan(0, 2): 0.7}))
    assert choice == plans.Choice(8, Plan(2, 1, 4), 0.5, plan(8, *SHAPE[1:], 4, A100), 1.0)


def test_the_usual_plan_stays_where_nothing_is_clearly_faster() -> None:
    choice = plans.choose(8, SHAPE, A100, measured({Plan(2, 1, 4): 0.98}))
    assert choice.best == choice.usual


def test_a_usual_plan_that_fails_is_replaced_and_none_that_runs_is_an_error() -> None:
    usual = plan(8, *SHAPE[1:], 4, A100)
    choice = plans.choose(8, SHAPE, A100, measured({usual: float("nan"), None: 2.0}))
    assert choice.best not in (usual, None)
    assert choice.usual_seconds is None
    assert choice.usual_reason == "RuntimeError: no"
    with pytest.raises(
        ConfigError, match="no plan of the CUDA kernels ran for 8 rows of a 4-bit layer .RuntimeError: no"
    ):
        plans.choose(8, SHAPE, A100, measured({}, usual=float("nan")))


# -- tables ------------------------------------------------------------------------------------------------------------


def test_a_table_comes_back_as_it_was_written_and_grows(cache: Path) -> None:
    path = plan_tables.write(TABLE, GPU)
    assert path.parent == cache / "gptq_backend" / "cuda"
    assert path.name.startswith("plans-nvidia-a100-sxm4-80gb-8.0-108-")
    assert plan_tables.read(path, GPU) == TABLE
    other = Shape(4, 128, 4)
    plan_tables.write({other: {1: None}, SHAPE: {1: Plan(2, 1, 8), 32: Plan(0, 2)}}, GPU)
    assert plan_tables.read(path, GPU) == {
        other: {1: None},
        SHAPE: {1: Plan(2, 1, 8), 16: Plan(2, 2, 4), 32: Plan(0, 2), 64: Plan(0, 4), 256: None},
    }
    assert [found.name for found in path.parent.iterdir()] == [path.name]  # and no lock


def test_between_measured_rows_the_plan_for_up_to_twice_as_many_serves_else_the_estimate() -> None:
    plan_tables.write(TABLE, Kind.of(CPU))
    found = {rows: best_plan(rows, SHAPE, CPU) for rows in (1, 8, 16, 32, 64, 128, 256)}
    small, middle, large = Plan(1, 1, 2), Plan(2, 2, 4), Plan(0, 4)
    assert found == {1: small, 8: middle, 16: middle, 32: large, 64: large, 128: None, 256: None}
    usual = (SHAPE.out_features, SHAPE.tiles, SHAPE.bits, gpu(CPU))
    for rows in (0, 2, 7, 17, 31, 65, 127, 257):
        assert best_plan(rows, SHAPE, CPU) == plan(rows, *usual)
    assert best_plan(8, SHAPE._replace(out_features=80), CPU) == plan(8, 80, *usual[1:])


def test_a_table_that_serves_is_told_once(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, plan_tables.logger.name):
        best_plan(1, SHAPE, CPU)
        assert not caplog.records
        path = plan_tables.write(TABLE, Kind.of(CPU))
        plan_tables.forget()
        for rows in (1, 16, 64):
            best_plan(rows, SHAPE, CPU)
    (record,) = caplog.records
    assert record.getMessage() == f"on cpu the measured plans in {path} serve"


def test_devices_with_another_size_of_shared_memory_have_a_table_of_their_own() -> None:
    less = GPU._replace(shared_bytes=99 << 10)
    plan_tables.write(TABLE, GPU)
    plan_tables.write({SHAPE: {2: None}}, less)
    assert plan_tables.read(GPU.path, GPU) == TABLE
    assert plan_tables.read(less.path, less) == {SHAPE: {2: None}}


@pytest.mark.skipif(os.name == "nt", reason="the lock is of another module there")
def test_writers_wait_for_each_other(monkeypatch: pytest.MonkeyPatch) -> None:
    GPU.path.parent.mkdir(parents=True)
    monkeypatch.setattr(plan_tables, "_PATIENCE", 0.1)
    held = claim(GPU.path.with_name(f"{GPU.path.name}.lock"))
    with pytest.raises(OSError, match="another process has kept .* locked"):
        plan_tables.write(TABLE, GPU)
    held.close()
    writers = [threading.Thread(target=plan_tables.write, args=({SHAPE: {rows: None}}, GPU)) for rows in range(1, 9)]
    monkeypatch.setattr(plan_tables, "_PATIENCE", 60.0)
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert plan_tables.read(GPU.path, GPU) == {SHAPE: dict.fromkeys(range(1, 9))}


def test_a_file_that_cannot_be_read_is_not_replaced() -> None:
    GPU.path.mkdir(parents=True)
    with pytest.raises(OSError, match="directory"):
        plan_tables.write(TABLE, GPU)


def test_a_user_without_a_home_has_no_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = plan_tables.write(TABLE, Kind.of(CPU))
    monkeypatch.chdir(tmp_path)
    assert plan_tables.read(path.relative_to(tmp_path), Kind.of(CPU)) == {}
    monkeypatch.setattr(plan_tables, "cache_folder", lambda: Path("~/.cache"))
    with pytest.raises(OSError, match="set XDG_CACHE_HOME"):
        plan_tables.write(TABLE, Kind.of(CPU))


def damaged(text: str, kind: str) -> str:
    content = json.loads(text)
    entry = content["plans"][0]
    if kind == "another device":
        content["name"] = "NVIDIA H100"
    elif kind == "other kernels":
        content["sources"] = "0"
    elif kind == "a plan without a kernel":
        entry["plan"]["strips"] = 7
    elif kind == "a plan of floats":
        entry["plan"]["strips"] = 1.0
    elif kind == "a plan with more":
        entry["plan"]["more"] = 1
    elif kind == "no rows":
        del entry["rows"]
    elif kind == "a list":
        return "[]"
    elif kind == "no text":
        return "\0"
    elif kind == "deep":
        return "[" * 100_000
    else:
        return text[: len(text) // 2]
    return json.dumps(content)


@pytest.mark.parametrize(
    "kind",
    [
        "another device", "other kernels", "a plan without a kernel", "a plan of floats", "a plan with more", "no rows",
        "a list", "no text", "deep", "truncated",
    ],
)  # fmt: skip
def test_a_bad_table_is_one_warning_and_the_estimate_serves(kind: str, caplog: pytest.LogCaptureFixture) -> None:
    path = plan_tables.write(TABLE, Kind.of(CPU))
    path.write_text(damaged(path.read_text(), kind))
    with caplog.at_level(logging.WARNING):
        for rows in (1, 2, 3):
            assert best_plan(rows, SHAPE, CPU) == plan(rows, SHAPE.out_features, SHAPE.tiles, 4, gpu(CPU))
    (record,) = caplog.records
    assert "are not used" in record.getMessage()
    assert "gptq-backend tune" in record.getMessage()
    plan_tables.write(TABLE, Kind.of(CPU))  # measuring again mends it
    assert plan_tables.read(path, Kind.of(CPU)) == TABLE


def test_a_table_that_cannot_be_read_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    Kind.of(CPU).path.mkdir(parents=True)
    assert best_plan(1, SHAPE, CPU) is not None
    assert "are not used" in caplog.text


# -- the kernels, emulated ---------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("driver")
def test_products_are_cut_as_the_table_says() -> None:
    served = prepared(random_weight(4, 256, 64, 64), cuda.KERNEL)
    layer = plans.Layer(Problem(64, 256, group_size=64, dtype="fp16"), [served])
    x = torch.randn(3, 256).half()
    fields = cuda.WeightFields(*cuda.KERNEL.layout.arguments(served.spec, served.tensors))
    for how in (Plan(1, 1, 3), Plan(0, 2), None):
        plan_tables.write({layer.shape: {4: how}}, Kind.of(CPU))
        plan_tables.forget()
        assert best_plan(3, layer.shape, CPU) == how
        assert torch.equal(cuda.gemm(x, *fields, None), cuda.planned_gemm(x, fields, None, how))


@pytest.mark.usefixtures("driver")
def test_times_are_of_plans_that_give_the_right_result() -> None:
    served = prepared(random_weight(4, 128, 32, 64), cuda.KERNEL)
    layer = plans.Layer(Problem(32, 128, group_size=64, dtype="fp16"), [served])
    tried = [None, Plan(1, 1, 2), Plan(0, 2), Plan(5, 1)]
    times, failed = layer.seconds(2, 1e-6, tried)
    assert list(times) == tried[:3]
    assert all(time > 0 for time in times.values())
    assert list(failed) == tried[3:]
    assert "no kernel with 5 strips" in failed[Plan(5, 1)]


@pytest.mark.usefixtures("driver")
def test_wrong_results_are_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = plans.Layer(Problem(32, 128, group_size=64), [prepared(random_weight(4, 128, 32, 64), cuda.KERNEL)])
    right = cuda.planned_gemm

    def planned(x: torch.Tensor, w: cuda.WeightFields, bias: torch.Tensor | None, how: Plan | None) -> torch.Tensor:
        return right(x, w, bias, how) * (1.5 if how == Plan(0, 2) else 1)

    monkeypatch.setattr(cuda, "planned_gemm", planned)
    times, failed = layer.seconds(2, 1e-6, [None, Plan(1, 1, 2), Plan(0, 2)])
    assert list(times) == [None, Plan(1, 1, 2)]
    assert failed == {Plan(0, 2): plans.WRONG}


@pytest.mark.usefixtures("driver")
def test_each_number_of_rows_is_kept_as_soon_as_it_is_measured() -> None:
    layer = plans.Layer(
        Problem(32, 128, bits=6, group_size=64, dtype="fp16"), [prepared(random_weight(8, 128, 32, 64), cuda.KERNEL)]
    )
    assert layer.shape == Shape(8, 32, 2)
    choices = plans.tune(layer, (1, 2), 1e-6)
    first = next(choices)
    kind = Kind.of(CPU)
    assert plan_tables.read(kind.path, kind) == {layer.shape: {1: first.best}}
    second = next(choices)
    assert [best_plan(rows, layer.shape, CPU) for rows in (1, 2)] == [first.best, second.best]
