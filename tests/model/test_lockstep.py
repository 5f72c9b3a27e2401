"""Tasks that wait for each other: nothing may hang, leak or swallow an exception."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from gptq_backend.model import lockstep


def run(functions: list[Callable[[], None]], log: list[str], keys: str = "abc") -> None:
    lockstep.run(functions, lambda key: log.append(f"stage {key}"), keys.index)


def test_all_reach_a_stage_before_any_goes_past_it() -> None:
    log: list[str] = []

    def task(name: str) -> Callable[[], None]:
        def body() -> None:
            log.append(f"{name}1")
            lockstep.wait("a")
            log.append(f"{name}2")
            lockstep.wait("b")
            log.append(f"{name}3")

        return body

    run([task("x"), task("y")], log)
    assert log == ["x1", "y1", "stage a", "x2", "y2", "stage b", "x3", "y3"]


def test_tasks_at_different_stages_are_served_in_rank_order() -> None:
    """Experts: one batch routes to an expert that another never visits."""
    log: list[str] = []

    def visits(name: str, keys: str) -> Callable[[], None]:
        def body() -> None:
            for key in keys:
                lockstep.wait(key)
                log.append(name + key)

        return body

    run([visits("x", "ac"), visits("y", "bc"), visits("z", "c"), visits("w", "")], log)
    assert log == ["stage a", "xa", "stage b", "yb", "stage c", "xc", "yc", "zc"]


def test_nothing_to_do() -> None:
    log: list[str] = []
    run([], log)
    run([lambda: None], log)
    assert log == []


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_exception_in_a_task_ends_all_and_unwinds_them(error: type[BaseException]) -> None:
    log: list[str] = []

    def waits() -> None:
        try:
            lockstep.wait("a")
            lockstep.wait("b")
        except Exception:
            log.append("swallowed by a model's handler")
        finally:
            log.append("unwound")

    def fails() -> None:
        lockstep.wait("a")
        raise error("boom")

    with pytest.raises(error, match="boom"):
        run([waits, fails], log)
    assert log == ["stage a", "unwound"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_exception_in_a_stage_ends_all_and_unwinds_them(error: type[BaseException]) -> None:
    log: list[str] = []

    def waits() -> None:
        try:
            lockstep.wait("a")
        finally:
            log.append("unwound")

    def stage(key: str) -> None:
        raise error("boom")

    with pytest.raises(error, match="boom"):
        lockstep.run([waits, waits], stage, "a".index)
    assert log == ["unwound", "unwound"]


def test_exception_before_the_first_wait() -> None:
    log: list[str] = []

    def fails() -> None:
        raise ValueError("boom")

    with pytest.raises(ValueError, match="boom"):
        run([lambda: lockstep.wait("a"), fails, lambda: log.append("never")], log)
    assert log == []


def test_a_run_can_follow_a_failed_one() -> None:
    test_exception_before_the_first_wait()
    test_all_reach_a_stage_before_any_goes_past_it()


def test_wait_outside_of_a_run_is_an_error() -> None:
    with pytest.raises((AssertionError, RuntimeError)):
        lockstep.wait("a")
