"""The kernel table: who is chosen, who is refused and why, and that no choice is silent."""

from __future__ import annotations

import dataclasses
import logging

import pytest
import torch

from gptq_backend import KERNELS, ConfigError, Kernel, QuantLinear, kernel_report, select_kernel
from gptq_backend.format import encode
from gptq_backend.kernels import PreparedWeight, reference
from gptq_backend.kernels import table as kernels
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import assert_same_packed, error, exact, packed

CPU = torch.device("cpu")
SPEC, TENSORS = encode(random_weight(4, 64, 32, 16))


@pytest.fixture
def picky(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    """A faster row in front of the table that serves symmetric layers only."""
    row = dataclasses.replace(
        reference.KERNEL,
        name="picky",
        supports=lambda spec, device: None if spec.sym else "asymmetric zeros",
        prepare=lambda weight: {"everything": weight.qweight.clone(), **reference.prepare(weight)},
    )
    monkeypatch.setattr(kernels, "KERNELS", [row, *KERNELS])
    kernels._warn_once.cache_clear()
    return row


def test_names_are_unique_and_the_reference_comes_last() -> None:
    names = [kernel.name for kernel in KERNELS]
    assert len(names) == len(set(names))
    assert names[-1] == "reference"


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.name)
def test_every_row_is_exact_where_it_serves(kernel: Kernel, bits: int) -> None:
    """Against float64, and repacking undone bit for bit; sizes that no tile divides."""
    for columns, outputs, size, act_order in [(64, 32, 16, False), (90, 40, 32, True), (50, 7, 50, False)]:
        weight = random_weight(bits, columns, outputs, size, act_order=act_order)
        given = packed(weight)
        if kernel.supports(given.spec, CPU) is not None:
            continue
        served = PreparedWeight.of(given, kernel)
        x, bias = torch.randn(5, columns), torch.randn(outputs)
        expected = exact(weight, x, bias)
        limit = 3e-2 if kernel.opt_in else 1e-5
        assert error(served.multiply(x, bias), expected) < limit
        assert error(served.multiply_in_graph(served.tensors, x, bias), expected) < limit
        assert error(served.dequantize(torch.float64), weight.dequantize(torch.float64)) < limit
        assert_same_packed(served.unprepare(), given)


@pytest.mark.parametrize("name", [None, "auto"])
def test_first_row_that_fits_is_chosen(picky: Kernel, name: str | None) -> None:
    symmetric, _ = encode(random_weight(4, 64, 32, 16, sym=True))
    assert select_kernel(symmetric, CPU, name) is picky
    assert select_kernel(SPEC, CPU, name).name != "picky"


def test_last_resort_warns_once_with_every_reason(picky: Kernel, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "KERNELS", [picky, reference.KERNEL])
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert select_kernel(SPEC, CPU).name == "reference"
    assert caplog.text.count("picky: asymmetric zeros") == 1


def test_reference_on_request_is_silent(caplog: pytest.LogCaptureFixture) -> None:
    kernels._warn_once.cache_clear()
    with caplog.at_level(logging.WARNING):
        assert select_kernel(SPEC, CPU, "reference").name == "reference"
    assert not caplog.records


def test_named_row_that_cannot_serve_says_why(picky: Kernel) -> None:
    with pytest.raises(ConfigError, match="picky.*asymmetric zeros.*auto"):
        select_kernel(SPEC, CPU, "picky")


def test_unknown_name_lists_the_rows(picky: Kernel) -> None:
    with pytest.raises(ConfigError, match="marlinn.*picky.*reference"):
        select_kernel(SPEC, CPU, "marlinn")


def test_report_names_every_row(picky: Kernel) -> None:
    report = kernel_report(SPEC, CPU)
    assert report["picky"] == "asymmetric zeros"
    assert report["reference"] is None


def test_a_rows_own_tensors_never_reach_the_state_dict(picky: Kernel) -> None:
    layer = QuantLinear.from_weight(random_weight(4, 64, 32, 16, sym=True)).prepare()
    assert "kernel=picky" in repr(layer)
    assert "everything" in dict(layer.named_parameters())
    assert set(layer.state_dict()) == {"qweight", "qzeros", "scales", "g_idx"}
    assert set(dict(layer.unprepare().named_parameters())) == {"qweight", "qzeros", "scales", "g_idx"}
