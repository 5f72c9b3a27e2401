"""Float32 products by oneDNN: as exact as ever, during a run only, and only on CPUs that keep them so."""

from __future__ import annotations

import contextlib
import threading
import time
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
    with fast_products():
        if _setting() != "bf16":
            pytest.skip("torch has no such setting, or this CPU would shorten factors")


@pytest.fixture
def _untried(monkeypatch: pytest.MonkeyPatch) -> None:
    if float32_products._settings() is None:
        pytest.skip("torch has no such setting")
    monkeypatch.setattr(float32_products._users, "exact", None)


def _shorten(monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply as a CPU with a unit for bfloat16 does."""
    linear = torch.nn.functional.linear
    monkeypatch.setattr(torch.nn.functional, "linear", lambda x, *rest: linear(x.bfloat16().to(x.dtype), *rest))


def test_products_are_of_float32_with_and_without() -> None:
    def worst() -> float:
        return max(error for size in float32_products._SIZES for error in float32_products._errors(*size))

    assert worst() < 1e-6
    with fast_products():
        assert worst() < 2e-6


@pytest.mark.usefixtures("_untried")
@pytest.mark.parametrize("defaults", ["plain", "float64", "bfloat16", "meta", "autocast"])
@pytest.mark.parametrize("shortened", [False, True])
def test_shortened_factors_are_noticed_whatever_the_users_defaults_are(
    defaults: str, shortened: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    with fast_products():  # what this CPU does
        exact = float32_products._users.exact
    monkeypatch.setattr(float32_products._users, "exact", None)
    if shortened:
        _shorten(monkeypatch)
    before, around = torch.get_default_dtype(), contextlib.nullcontext()
    if defaults in ("float64", "bfloat16"):
        torch.set_default_dtype(getattr(torch, defaults))
    elif defaults != "plain":
        around = torch.device("meta") if defaults == "meta" else torch.autocast("cpu", torch.bfloat16)
    try:
        with around, fast_products():
            assert float32_products._users.exact == (exact and not shortened)
            assert (_setting() == "bf16") == (exact and not shortened)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.usefixtures("_untried")
def test_first_runs_in_several_threads_leave_the_setting_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    errors, barrier = float32_products._errors, threading.Barrier(4)

    def slow(*size: int) -> list[float]:
        time.sleep(0.02)
        return errors(*size)

    def run() -> None:
        barrier.wait(10)
        with fast_products():
            pass

    monkeypatch.setattr(float32_products, "_errors", slow)
    before, threads = _setting(), [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert _setting() == before


@pytest.mark.usefixtures("_untried")
def test_nothing_is_set_or_concluded_while_onednn_is_turned_off() -> None:
    with torch.backends.mkldnn.flags(enabled=False), fast_products():
        assert float32_products._users.exact is None


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
def test_a_setting_that_follows_that_of_all_backends_still_follows_it_afterwards() -> None:
    before = torch.backends.fp32_precision
    try:
        torch.backends.fp32_precision = "tf32"
        with fast_products():
            assert _setting() == "bf16"
        torch.backends.fp32_precision = "ieee"
        assert _setting() == "ieee"
    finally:
        torch.backends.fp32_precision = before


@pytest.mark.usefixtures("_used")
def test_what_somebody_sets_meanwhile_stays() -> None:
    settings = float32_products._settings()
    try:
        with fast_products():
            settings.fp32_precision = "tf32"
        assert _setting() == "tf32"
    finally:
        settings.fp32_precision = "none"


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
