"""The weight that makes up for drift: the least-squares solution, from sums over tokens that count as they should."""

from __future__ import annotations

import math

import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_backend import QuantizeConfig
from gptq_backend.algorithm.drift import CrossMoment, make_up
from gptq_backend.algorithm.gptq import prepare_factor


@given(
    seed=st.integers(0, 2**32 - 1),
    tokens=st.integers(4, 60),
    channels=st.integers(1, 24),
    outputs=st.integers(1, 9),
    residual=st.booleans(),
    damp=st.sampled_from([0.01, 0.15, 0.9]),
    desc_act=st.booleans(),
)
def test_no_other_weight_comes_closer_to_the_original_outputs(
    seed: int, tokens: int, channels: int, outputs: int, residual: bool, damp: float, desc_act: bool
) -> None:
    generator = torch.Generator().manual_seed(seed)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    x, weight = random(tokens, channels), random(outputs, channels)
    original, lost = x + 0.3 * random(tokens, channels), random(tokens, outputs) * residual
    config = QuantizeConfig(damp_percent=damp, group_size=8, desc_act=desc_act)
    shared = prepare_factor(x.T @ x, config, math.inf)
    found = make_up(weight, shared, weight @ (original - x).T @ x + lost.T @ x)

    free = found.clone().requires_grad_()
    wanted = original @ weight.T + lost
    damping = shared.factor.damp_percent * shared.hessian.diagonal().median()
    # Dead channels have the median on their diagonal; here none is dead.
    cost = (x @ free.T - wanted).square().sum() + damping * (free - weight).square().sum()
    cost.backward()
    assert free.grad is not None
    scale = (x.T @ wanted).abs().max() + (x.T @ x).abs().max()
    assert free.grad.abs().max() < 1e-9 * scale * tokens


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
    assert torch.equal(make_up(weight, shared, torch.zeros(4, 16)), weight)


def test_the_weight_stays_where_the_hessian_could_not_be_factored() -> None:
    x, weight = torch.randn(40, 8), torch.randn(2, 8)
    hessian = x.T @ x
    hessian[0, 1] = hessian[1, 0] = 1e6  # far from positive definite
    shared = prepare_factor(hessian, QuantizeConfig(group_size=8, damp_percent=1e-6))
    assert shared.factor.method == "diagonal"
    assert torch.equal(make_up(weight, shared, torch.randn(2, 8)), weight)
