"""The weight that makes up for drift: the least-squares solution, from sums over tokens that count as they should."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_backend import QuantizeConfig
from gptq_backend.algorithm.drift import CrossMoment, Drift, confirmed_share, make_up, parabola, prepare_solver
from gptq_backend.algorithm.gptq import prepare_factor


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@given(
    seed=st.integers(0, 2**32 - 10),
    tokens=st.integers(4, 60),
    channels=st.integers(1, 24),
    outputs=st.integers(1, 9),
    desc_act=st.booleans(),
    first=st.integers(1, 3),
)
def test_the_weight_lies_on_the_way_to_the_least_squares_solution(
    seed: int, tokens: int, channels: int, outputs: int, desc_act: bool, first: int
) -> None:
    x, weight, lost = (
        random(seed, tokens, channels),
        random(seed + 1, outputs, channels),
        random(seed + 2, tokens, outputs),
    )
    lost += x @ random(seed + 3, channels, outputs)
    shared = prepare_factor(x.T @ x, QuantizeConfig(group_size=8, desc_act=desc_act), math.inf)
    solver = prepare_solver(shared, tokens)
    pulls = torch.stack([lost[part].T @ x[part] for part in (slice(first), slice(first, None))])
    drift = Drift(pulls, (first, tokens - first), True)
    change = make_up(weight, shared.hessian, solver, drift) - weight

    free = change.new_zeros(change.shape).requires_grad_()
    damping = solver.damp_percent * shared.hessian.diagonal().median()
    cost = (x @ free.T - lost).square().sum() + damping * free.square().sum()
    (slope,) = torch.autograd.grad(cost, free)
    full = -slope / 2 @ torch.linalg.inv(x.T @ x + damping * torch.eye(channels, dtype=torch.float64))
    share = float((change * full).sum() / full.square().sum())
    assert -1e-9 <= share <= 1 + 1e-9
    torch.testing.assert_close(change, share * full, atol=1e-9, rtol=1e-7)


@given(
    seed=st.integers(0, 2**32 - 10),
    signal=st.floats(0, 3),
    damp=st.floats(0, 2),
    first=st.floats(0.05, 0.95),
)
def test_the_parabola_is_the_error_on_the_other_half(seed: int, signal: float, damp: float, first: float) -> None:
    """Parts of one H, of any size, each scaled to half of the tokens."""
    root = random(seed, 16, 8)
    hessian = root.T @ root
    inverse = torch.linalg.inv(hessian + damp * torch.eye(8, dtype=torch.float64))
    common, shares = signal * random(seed + 1, 3, 8), (first, 1 - first)
    pulls = torch.stack([common @ hessian * share + random(seed + 2 + i, 3, 8) for i, share in enumerate(shares)])
    b, c = parabola(pulls, pulls @ inverse, damp, first).tolist()
    for h in 0.3, 1.0:
        fall = 0.0
        for i, share in enumerate(shares):
            made, there = h * pulls[i] @ inverse / share, pulls[1 - i] / (2 * (1 - share))
            fall += float(2 * (made * there).sum() - (made @ hessian / 2 * made).sum())
        torch.testing.assert_close(b * h - c * h * h, fall, atol=1e-7, rtol=1e-7)


@given(signal=st.floats(0.1, 10), noise=st.floats(0, 10), first=st.floats(0.05, 0.95))
def test_the_share_is_that_of_a_signal_in_noise_that_all_tokens_have(signal: float, noise: float, first: float) -> None:
    """A part of the tokens has more noise; what it asks for agrees with the rest in the signal alone."""
    parts = [signal + noise / share for share in (first, 1 - first)]
    parabolas = torch.tensor([2 * signal, sum(parts) / 2], dtype=torch.float64)  # best at signal / mean(parts)
    assert math.isclose(confirmed_share(parabolas, first), signal / (signal + noise))


@given(seed=st.integers(0, 2**32 - 10), first=st.integers(80, 1920))
def test_parts_of_any_size_confirm_a_drift_that_the_input_tells(seed: int, first: int) -> None:
    tokens, channels = 2000, 8
    x = random(seed, tokens, channels)
    drift = x @ random(seed + 1, channels, 4)
    solver = prepare_solver(shared := prepare_factor(x.T @ x, QuantizeConfig(group_size=8)), tokens)
    pulls = torch.stack([drift[part].T @ x[part] for part in (slice(first), slice(first, None))])
    full = pulls.sum(0) @ solver.upper.T @ solver.upper
    made = make_up(torch.zeros_like(full), shared.hessian, solver, Drift(pulls, (first, tokens - first), True))
    assert made.norm() > 0.7 * full.norm()


@given(seed=st.integers(0, 2**32 - 10), of_output=st.booleans())
def test_ranks_that_share_the_rows_make_the_same_weight(seed: int, of_output: bool) -> None:
    x, weight = random(seed, 300, 16), random(seed + 1, 1100, 16)
    shared = prepare_factor(x.T @ x, QuantizeConfig(group_size=8))
    solver = prepare_solver(shared, 300)
    drift = Drift(random(seed + 2, 2, 1100 if of_output else 16, 16) + 1, (150, 150), of_output)
    expected = make_up(weight, shared.hessian, solver, drift)
    assert not torch.equal(expected, weight)
    shares: list[int] = []

    def backwards(count: int, part: Callable[[int], list[torch.Tensor]]) -> list[list[torch.Tensor]]:
        shares.append(count)
        return [part(i) for i in reversed(range(count))][::-1]

    assert torch.equal(make_up(weight, shared.hessian, solver, drift, backwards), expected)
    assert shares > [1]


def test_what_one_half_alone_asks_for_is_not_made() -> None:
    x, weight = random(0, 400, 16), random(1, 4, 16)
    shared = prepare_factor(x.T @ x, QuantizeConfig(group_size=8))
    solver = prepare_solver(shared, 400)
    pull = random(2, 4, 16)
    against = make_up(weight, shared.hessian, solver, Drift(torch.stack([pull, -pull]), (200, 200), True))
    assert torch.equal(against, weight)
    agreed = make_up(weight, shared.hessian, solver, Drift(torch.stack([pull, pull]), (200, 200), True))
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
        made = make_up(torch.zeros_like(full), shared.hessian, solver, Drift(pulls, (tokens // 2, tokens // 2), True))
        return float(made.norm() / full.norm())

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
    drift = Drift(torch.zeros(2, 16, 16), (20, 20), False)
    assert torch.equal(make_up(weight, shared.hessian, prepare_solver(shared, 40), drift), weight)


def test_the_weight_stays_where_the_hessian_could_not_be_factored() -> None:
    x, weight = torch.randn(40, 8), torch.randn(2, 8)
    hessian = x.T @ x
    hessian[0, 1] = hessian[1, 0] = 1e9  # far from positive definite
    shared = prepare_factor(hessian, QuantizeConfig(group_size=8, damp_percent=1e-6))
    solver = prepare_solver(shared, 40)
    assert solver.method == "diagonal"
    drift = Drift(torch.randn(2, 2, 8), (20, 20), True)
    assert torch.equal(make_up(weight, shared.hessian, solver, drift), weight)
