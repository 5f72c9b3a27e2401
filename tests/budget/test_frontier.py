"""The chooser spends a budget as well as trying everything would."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptq_backend.budget.frontier import find_frontier

CHOICES = st.lists(st.tuples(st.integers(1, 40), st.integers(0, 1000).map(float)), min_size=1, max_size=4)
GROUPS = st.lists(CHOICES, min_size=1, max_size=5)


@given(GROUPS, st.integers(0, 200))
def test_no_choice_within_the_budget_has_less_divergence(groups: list[list[tuple[int, float]]], budget: int) -> None:
    frontier = find_frontier(groups)
    point = frontier.within(budget)
    sums = [(sum(s for s, _ in each), sum(d for _, d in each)) for each in itertools.product(*groups)]
    least = min((cost for size, cost in sums if size <= budget), default=None)
    if least is None:
        assert point is None
        assert int(frontier.nbytes[0]) == min(size for size, _ in sums) > budget
        return
    assert point is not None
    picked = [group[index] for group, index in zip(groups, frontier.choices(point), strict=True)]
    assert sum(cost for _, cost in picked) == float(frontier.divergence[point]) == least
    assert sum(size for size, _ in picked) == int(frontier.nbytes[point]) <= budget


@given(GROUPS)
def test_more_bytes_never_give_more_divergence(groups: list[list[tuple[int, float]]]) -> None:
    frontier = find_frontier(groups)
    assert bool((frontier.nbytes.diff() > 0).all())
    assert bool((frontier.divergence.diff() < 0).all())


@given(st.lists(st.floats(0.01, 1), min_size=8, max_size=20), st.integers(0, 10))
def test_a_thinned_frontier_stays_within_the_budget_and_near_the_best(costs: list[float], share: int) -> None:
    groups = [[(100 + 7 * i, cost), (153 + 11 * i, cost / 5), (209 + i, cost / 25)] for i, cost in enumerate(costs)]
    exact, thin = find_frontier(groups, points=1 << 60), find_frontier(groups, points=200)
    assert len(thin.nbytes) <= 200
    low, high = int(exact.nbytes[0]), int(exact.nbytes[-1])
    budget = low + (high - low) * share // 10
    point, best = thin.within(budget), exact.within(budget)
    assert point is not None
    assert best is not None
    picked = [group[index] for group, index in zip(groups, thin.choices(point), strict=True)]
    assert sum(size for size, _ in picked) <= budget
    assert sum(cost for _, cost in picked) == pytest.approx(float(thin.divergence[point]))
    assert float(thin.divergence[point]) <= 1.25 * float(exact.divergence[best]) + 1e-12
