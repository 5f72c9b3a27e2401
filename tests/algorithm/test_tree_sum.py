"""Sums do not depend on who adds what."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptq_backend.algorithm.hessian import Hessian
from gptq_backend.algorithm.tree_sum import TreeSum, total

parts = st.lists(st.booleans(), min_size=1, max_size=40)  # whether each part exists
cuts = st.lists(st.integers(0, 40), max_size=6)


def part(number: int) -> Tensor:
    return torch.randn(3, generator=torch.Generator().manual_seed(number))


def nodes(exist: list[bool], first: int, stop: int) -> dict[tuple[int, int], Tensor]:
    found = TreeSum(first)
    for number in range(first, stop):
        if exist[number]:
            found.add(number, part(number))
    return found.nodes


@given(parts, cuts)
def test_a_sum_is_the_same_to_the_bit_however_its_parts_are_shared_out(exist: list[bool], cuts: list[int]) -> None:
    edges = sorted({0, len(exist), *(cut for cut in cuts if cut < len(exist))})
    joined: dict[tuple[int, int], Tensor] = {}
    for first, stop in itertools.pairwise(edges):
        joined |= nodes(exist, first, stop)
    found, expected = total(joined), total(nodes(exist, 0, len(exist)))
    if not any(exist):
        assert found is None
        assert expected is None
    else:
        assert found is not None
        assert expected is not None
        assert torch.equal(found, expected)
        exact = sum(part(number).double() for number, exists in enumerate(exist) if exists)
        torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)


@given(st.integers(1, 300))
def test_a_process_holds_one_sum_for_each_level(count: int) -> None:
    found = TreeSum()
    for number in range(count):
        found.add(number, torch.zeros(1))
        assert len(found.nodes) <= (number + 1).bit_length()


def test_a_hessian_of_parts_that_came_one_by_one_is_that_of_all_rows() -> None:
    x = torch.randn(7, 20, 300, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    hessian = Hessian(300, torch.float64)
    for number in (0, 2, 3, 6):
        hessian.add(x[number], number=number)
    rows = x[[0, 2, 3, 6]].flatten(0, 1)
    torch.testing.assert_close(hessian.matrix("layer"), rows.t() @ rows)
    assert hessian.tokens == 80
