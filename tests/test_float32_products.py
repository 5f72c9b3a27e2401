"""Float32 products by oneDNN: as exact as ever, during a run only, and only on CPUs that keep them so."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import pytest
import torch

from gptq_backend import QuantizeConfig, float32_products, quantize_model
from gptq_backend.float32_products import fast_products

from .toy import samples, toy


def _setting() -> str | None:
    return getattr(float32_products._settings(), "fp32_precision", None)


@pytest.fixture(autouse=True)
def _unchanged() -> Iterator[None]:
    before = _setting()
    yield
    assert _setting() == before


@pytest.fixture
def _used() -> None:
    if not float32_products._exact():
        pytest.skip("torch has no such setting, or this CPU would shorten factors")


def test_products_are_of_float32_with_and_without() -> None:
    def worst() -> float:
        return max(error for size in float32_products._SIZES for error in float32_products._errors(*size))

    assert worst() < 1e-6
    with fast_products():
        assert worst() < 2e-6


def test_shortened_factors_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As a CPU with a unit for bfloat16 shortens them."""
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *rest: linear(x.bfloat16().float(), *rest))
    assert not float32_products._exact.__wrapped__()


def test_a_cpu_that_shortens_factors_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(float32_products, "_exact", lambda: False)
    before = _setting()
    with fast_products():
        assert _setting() == before


@pytest.mark.usefixtures("_used")
def test_the_setting_is_back_after_an_error_and_after_the_last_of_several_threads() -> None:
    begun, end = threading.Event(), threading.Event()

    def other() -> None:
        with fast_products():
            begun.set()
            end.wait(10)

    before, thread = _setting(), threading.Thread(target=other)
    with pytest.raises(ValueError, match="within"), fast_products():
        thread.start()
        assert begun.wait(10)
        raise ValueError("within")
    assert _setting() == "bf16"
    end.set()
    thread.join()
    assert _setting() == before


@pytest.mark.usefixtures("_used")
def test_a_whole_run_multiplies_so_and_a_setting_of_the_users_is_back_afterwards() -> None:
    seen = set()
    model = toy()
    model.register_forward_pre_hook(lambda *_: seen.add(_setting()))
    settings = float32_products._settings()
    before, settings.fp32_precision = settings.fp32_precision, "ieee"
    try:
        quantize_model(model, QuantizeConfig(group_size=32), samples())
        assert _setting() == "ieee"
    finally:
        settings.fp32_precision = before
    assert seen == {"bf16"}
