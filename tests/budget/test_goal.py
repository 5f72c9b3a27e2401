"""Sizes are read as people write them, and nonsense is refused."""

from __future__ import annotations

from typing import Any

import pytest

from gptq_backend import ConfigError
from gptq_backend.budget import read_goal


@pytest.mark.parametrize(
    ("text", "nbytes"),
    [
        ("800MB", 800_000_000),
        ("1.5 GiB", 3 << 29),
        ("90kb", 90_000),
        ("64KiB", 1 << 16),
        ("2G", 2 * 10**9),
        ("123", 123),
        (123, 123),
        (" 7 MB ", 7_000_000),
    ],
)
def test_a_size_is_bytes_with_a_unit(text: str | int, nbytes: int) -> None:
    goal = read_goal(text, None)
    assert goal is not None
    assert (goal.nbytes, goal.layer_bits) == (nbytes, None)


@pytest.mark.parametrize(
    "text",
    ["", "MB", "800 MX", "-1MB", "0", "0GB", "1e3MB", "8_0MB", "800MBit", "9" * 400 + "GB", "1M\u0130B", "0.5", 0, -5],
)
def test_a_size_that_is_none_is_refused_with_what_is_expected(text: str | int) -> None:
    with pytest.raises(ConfigError, match="use bytes or a unit, like 800MB"):
        read_goal(text, None)


@pytest.mark.parametrize("bits", [0, -3.0, 17, float("nan"), float("inf")])
def test_bits_that_no_layer_can_have_are_refused(bits: float) -> None:
    with pytest.raises(ConfigError, match="target_bits="):
        read_goal(None, bits)


def test_two_budgets_exclude_each_other_and_none_is_none() -> None:
    both: Any = ("1MB", 4.0)
    with pytest.raises(ConfigError, match="exclude each other"):
        read_goal(*both)
    assert read_goal(None, None) is None
