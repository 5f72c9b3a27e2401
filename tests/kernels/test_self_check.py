"""A row that gives wrong results does not serve, and says so; a right one is asked once."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from gptq_backend import KERNELS, ConfigError, Kernel, WeightSpec, select_kernel
from gptq_backend.kernels import EXPERT_KERNELS, cpu, expert_kernel, reference, self_check
from gptq_backend.kernels import table as kernels
from tests.kernels.checks import native

CPU = torch.device("cpu")
SPEC = WeightSpec(1024, 512, 4, 128, 8)


@pytest.fixture(autouse=True)
def unchecked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(self_check.VARIABLE, raising=False)
    self_check.forget()
    kernels._warn_once.cache_clear()


@pytest.fixture
def row(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., Tensor]], Kernel]:
    """Puts a row with this product in front of the table."""

    def add(change: Callable[..., Tensor]) -> Kernel:
        def gemm(x: Tensor, *arguments: Any) -> Tensor:
            return change(x, reference.KERNEL.gemm(x, *arguments))

        added = dataclasses.replace(reference.KERNEL, name="added", gemm=gemm)
        monkeypatch.setattr(kernels, "KERNELS", [added, *KERNELS])
        return added

    return add


def one_element(x: Tensor, y: Tensor) -> Tensor:
    y = y.clone()
    y[-1, 7] += y.std()
    return y


def fail(x: Tensor, y: Tensor) -> Tensor:
    raise RuntimeError("no kernel image is available\nfor execution")


LIES: dict[str, tuple[Callable[..., Tensor], str]] = {
    "zeros": (lambda x, y: torch.zeros_like(y), "off by"),
    "NaN": (lambda x, y: y * float("nan"), "its results are wrong: NaN, of 1 rows in float16"),
    "one element": (one_element, "off by"),
    "many rows": (lambda x, y: y if len(y) < 200 else y.flip(0), "of 200 rows in float16"),
    "bfloat16": (lambda x, y: y if x.dtype is torch.float16 else 1.2 * y, "of 1 rows in bfloat16"),
    "an error": (fail, r"it failed \(RuntimeError: no kernel image is available\)"),
}


@pytest.mark.parametrize("name", LIES)
def test_a_row_that_lies_is_left_out_with_one_warning(name: str, row: Any, caplog: pytest.LogCaptureFixture) -> None:
    lie, message = LIES[name]
    row(lie)
    with caplog.at_level(logging.WARNING):
        chosen = [select_kernel(SPEC, CPU) for _ in range(3)]
    assert {kernel.name for kernel in chosen} == {
        KERNELS[1].name if KERNELS[1].supports(SPEC, CPU) is None else "reference"
    }
    (record,) = [each for each in caplog.records if "'added'" in each.getMessage()]
    assert "does not serve 4-bit weights on cpu" in record.getMessage()
    assert "gptq-backend doctor" in record.getMessage()
    with pytest.raises(ConfigError, match=message):
        select_kernel(SPEC, CPU, "added")


def test_a_row_is_asked_once_per_kind_of_weight(row: Any) -> None:
    calls: list[int] = []
    row(lambda x, y: calls.append(len(x)) or y)  # type: ignore[func-returns-value]
    for spec in (SPEC, dataclasses.replace(SPEC, in_features=4096, groups=32), SPEC):
        assert select_kernel(spec, CPU).name == "added"
    assert len(calls) == len(self_check.DTYPES) * 4
    select_kernel(dataclasses.replace(SPEC, sym=False), CPU)
    assert len(calls) == 2 * len(self_check.DTYPES) * 4


@native
@pytest.mark.parametrize("lie", [lambda y: y.flip(0), lambda y: y + 1, lambda y: y * float("nan")])
def test_a_grouped_product_that_lies_does_not_serve_experts(lie: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    honest = expert_kernel(cpu.KERNEL)
    assert honest is not None
    wrong = dataclasses.replace(honest, gemm=lambda *arguments: lie(honest.gemm(*arguments)))
    monkeypatch.setattr(kernels, "EXPERT_KERNELS", [wrong if row is honest else row for row in EXPERT_KERNELS])
    assert select_kernel(SPEC, CPU) is cpu.KERNEL
    assert select_kernel(SPEC, CPU, expert=True) is not cpu.KERNEL
    with pytest.raises(ConfigError, match="its grouped results are wrong"):
        select_kernel(SPEC, CPU, "cpu", expert=True)


def test_it_can_be_turned_off(row: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    row(lambda x, y: 0 * y)
    monkeypatch.setenv(self_check.VARIABLE, "0")
    assert select_kernel(SPEC, CPU).name == "added"


def test_want_of_memory_is_no_fault(row: Any) -> None:
    def fail(x: Tensor, y: Tensor) -> Tensor:
        raise torch.OutOfMemoryError("out of memory")

    row(fail)
    assert select_kernel(SPEC, CPU).name == "added"


def test_nothing_is_computed_in_a_trace(row: Any) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    kernel = row(lambda x, y: 0 * y)
    with FakeTensorMode():
        assert self_check.fault(kernel, SPEC, CPU) is None
    assert self_check.fault(kernel, SPEC, CPU) is not None


def test_a_default_device_does_not_hinder_it(row: Any) -> None:
    kernel = row(lambda x, y: 0 * y)
    with torch.device("meta"):
        assert "its results are wrong" in str(self_check.fault(kernel, SPEC, CPU))


def test_functions_that_somebody_watches_are_not_called(row: Any) -> None:
    class Watching(TorchFunctionMode):
        def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            raise AssertionError(function)

    kernel = row(lambda x, y: 0 * y)
    with Watching():
        assert self_check.fault(kernel, SPEC, CPU) is None
    assert self_check.fault(kernel, SPEC, CPU) is not None


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("size", "groups"), [(32, 32), (128, 8), (1024, 1)])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_right_rows_pass(dtype: torch.dtype, bits: int, size: int, groups: int, sym: bool, act_order: bool) -> None:
    spec = WeightSpec(1024, 512, bits, size, groups, sym, act_order and groups > 1, dtype)
    for kernel in KERNELS:
        if kernel.supports(spec, CPU) is None:
            assert self_check.fault(kernel, spec, CPU, expert_kernel(kernel)) is None, kernel.name


def test_random_numbers_and_modes_are_left_as_they_were() -> None:
    state = torch.get_rng_state()
    with torch.inference_mode():
        self_check.fault(KERNELS[1], SPEC, CPU)
        assert torch.is_inference_mode_enabled()
    assert torch.equal(torch.get_rng_state(), state)
