"""The weight that makes up for drift: the least-squares solution, from sums over tokens that count as they should."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_backend import QuantizeConfig
from gptq_backend.algorithm.drift import CrossMoment, confirmed_share, make_up, prepare_solver
from gptq_backend.algorithm.gptq import prepare_factor


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    seed=st.integers(0, 2**32 - 10),
    tokens=st.integers(4, 60),
    channels=st.integers(1, 24),
    outputs=st.integers(1, 9),
    desc_act=st.booleans(),
)
def test_the_weight_lies_on_the_way_to_the_least_squares_solution(
    seed: int, tokens: int, channels: int, outputs: int, desc_act: bool
) -> None:
    x, weight, lost = (
        random(seed, tokens, channels),
        random(seed + 1, outputs, channels),
        random(seed + 2, tokens, outputs),
    )
    lost += x @ random(seed + 3, channels, outputs)
    shared = prepare_factor(x.T @ x, QuantizeConfig(group_size=8, desc_act=desc_act), math.inf)
    solver = prepare_solver(shared, tokens)
    pulls = torch.stack([lost[odd::2].T @ x[odd::2] for odd in range(2)])
    change = make_up(weight, shared.hessian, solver, pulls) - weight

    free = change.new_zeros(change.shape).requires_grad_()
    damping = solver.damp_percent * shared.hessian.diagonal().median()
    cost = (x @ free.T - lost).square().sum() + damping * free.square().sum()
    (slope,) = torch.autograd.grad(cost, free)
    full = -slope / 2 @ torch.linalg.inv(x.T @ x + damping * torch.eye(channels, dtype=torch.float64))
    share = float((change * full).sum() / full.square().sum())
    assert -1e-9 <= share <= 1 + 1e-9
    torch.testing.assert_close(change, share * full, atol=1e-9, rtol=1e-7)


@given(seed=st.integers(0, 2**32 - 10), signal=st.floats(0, 3), damp=st.floats(0, 2))
def test_the_share_is_that_with_the_least_error_on_the_other_half(seed: int, signal: float, damp: float) -> None:
    """Halves of the same H: the best share of a half's change, by trying, is what the parabola says."""
    root = random(seed, 16, 8)
    half = root.T @ root
    inverse = torch.linalg.inv(2 * half + damp * torch.eye(8, dtype=torch.float64))
    common = signal * random(seed + 1, 3, 8)
    pulls = torch.stack([common @ half + random(seed + 2 + i, 3, 8) for i in range(2)])
    changes = pulls @ inverse

    def error(share: float) -> float:
        total = 0.0
        for i in range(2):
            made = share * 2 * changes[i]
            total += float((made @ half * made).sum() - 2 * (made * pulls[1 - i]).sum())
        return total

    found = confirmed_share(pulls, changes, damp)
    best = found / (2 - found)  # of a half
    assert all(error(best) <= error(other) + 1e-9 for other in torch.linspace(0, 1, 101).tolist())


def test_what_one_half_alone_asks_for_is_not_made() -> None:
    x, weight = random(0, 400, 16), random(1, 4, 16)
    shared = prepare_factor(x.T @ x, QuantizeConfig(group_size=8))
    solver = prepare_solver(shared, 400)
    pull = random(2, 4, 16)
    against = make_up(weight, shared.hessian, solver, torch.stack([pull, -pull]))
    assert torch.equal(against, weight)
    agreed = make_up(weight, shared.hessian, solver, torch.stack([pull, pull]))
    assert not torch.equal(agreed, weight)


@given(seed=st.integers(0, 2**32 - 10))
def test_of_chance_little_is_made_and_of_a_drift_that_the_input_tells_most(seed: int) -> None:
    tokens, channels = 2000, 32
    x, chance = random(seed, tokens, channels), 10 * random(seed + 1, tokens, 32)
    told = x @ random(seed + 2, channels, 32)
    shared = prepare_factor(x.T @ x, QuantizeConfig(group_size=8))
    solver = prepare_solver(shared, tokens)

    def share(drift: torch.Tensor) -> float:
        pulls = torch.stack([drift[odd::2].T @ x[odd::2] for odd in range(2)])
        full = pulls.sum(0) @ solver.upper.T @ solver.upper
        return float(make_up(torch.zeros_like(full), shared.hessian, solver, pulls).norm() / full.norm())

    assert share(chance) < 0.2 < 0.4 < share(told + chance) < share(told) + 1e-9 <= 1 + 1e-8


@given(seed=st.integers(0, 2**32 - 1), parts=st.lists(st.integers(0, 7), min_size=1, max_size=6))
def test_the_moment_is_the_weighted_sum_over_finite_tokens(seed: int, parts: list[int]) -> None:
    generator = torch.Generator().manual_seed(seed)
    moment = CrossMoment(3, 5, torch.float64, torch.device("cpu"))
    expected = torch.zeros(3, 5, dtype=torch.float64)
    for number, tokens in enumerate(parts):
        drift, x, weights = (torch.randn(tokens, n, generator=generator, dtype=torch.float64) for n in (3, 5, 1))
        expected += (weights * drift).T @ x
        spoilt = torch.cat([x, torch.full((1, 5), math.nan, dtype=torch.float64)])
        more = torch.cat([drift, torch.ones(1, 3, dtype=torch.float64)]), torch.cat([weights, torch.ones(1, 1)])
        moment.add(number, more[0], spoilt, more[1])
    assert moment.dropped == len(parts)
    if not sum(parts):
        assert moment.matrix() is None
        return
    found = moment.matrix()
    assert found is not None
    torch.testing.assert_close(found, expected)


def test_without_drift_the_weight_stays() -> None:
    x, weight = torch.randn(40, 16), torch.randn(4, 16)
    shared = prepare_factor(x.T @ x, QuantizeConfig(group_size=8))
    assert torch.equal(make_up(weight, shared.hessian, prepare_solver(shared, 40), torch.zeros(2, 4, 16)), weight)


def test_the_weight_stays_where_the_hessian_could_not_be_factored() -> None:
    x, weight = torch.randn(40, 8), torch.randn(2, 8)
    hessian = x.T @ x
    hessian[0, 1] = hessian[1, 0] = 1e9  # far from positive definite
    shared = prepare_factor(hessian, QuantizeConfig(group_size=8, damp_percent=1e-6))
    solver = prepare_solver(shared, 40)
    assert solver.method == "diagonal"
    assert torch.equal(make_up(weight, shared.hessian, solver, torch.randn(2, 2, 8)), weight)
