"""The line of the log that says which kernel serves how many layers."""

from __future__ import annotations

import gc
import pickle
from typing import Any

import pytest

pytest.importorskip("vllm")

from gptq_vllm import load_report
from gptq_vllm.load_report import LoadReport

LABEL = "Quantized layers by kernel of gptq-backend: "


class _Method:
    pass


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    found: list[str] = []
    monkeypatch.setattr(load_report.logger, "info", lambda text, *values: found.append(text % values))
    return found


def _expected(report: LoadReport, count: int) -> list[Any]:
    methods = [_Method() for _ in range(count)]
    for method in methods:
        report.expect(method)
    return methods


def test_one_line_counts_the_layers_of_each_kernel(lines: list[str]) -> None:
    report = LoadReport()
    methods = _expected(report, 4)
    for method, kernels in zip(methods, ({"cpu"}, {"reference"}, {"cpu"}, {"reference", "cpu"})):
        assert lines == []
        report.loaded(method, kernels)
    assert lines == [f"{LABEL}2 cpu, 1 reference, 1 cpu and reference"]
    report.loaded(methods[0], {"cpu"})  # a reload
    for method in _expected(report, 2):  # a draft model
        report.loaded(method, {"cpu"})
    assert lines[1:] == [f"{LABEL}2 cpu"]


def test_layers_that_vllm_throws_away_are_not_waited_for(lines: list[str]) -> None:
    report = LoadReport()
    methods = _expected(report, 2)
    del methods[0]
    gc.collect()
    report.loaded(methods[0], {"cpu"})
    assert lines == [f"{LABEL}1 cpu"]


def test_a_report_can_be_sent_to_another_process() -> None:
    report = LoadReport()
    methods = _expected(report, 1)
    again = pickle.loads(pickle.dumps(report))
    again.loaded(methods[0], {"cpu"})
