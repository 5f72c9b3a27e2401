"""Rows that make up for each other's errors: targets are optima, and feedback is left out where it would not help."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from gptq_backend import CalibrationError, QuantizeConfig
from gptq_backend.algorithm.gptq import prepare_factor, quantize_weight
from gptq_backend.algorithm.row_feedback import RowFactor, factor_rows, in_turns
from gptq_backend.format.weight import QuantizedWeight


def random(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def factor_of(moment: torch.Tensor) -> RowFactor:
    """Without damping."""
    order = moment.diagonal().argsort(descending=True)
    inverse = torch.linalg.inv(moment[order][:, order])
    return RowFactor(order, torch.linalg.cholesky(inverse, upper=True))


def to_tenths(rows: torch.Tensor) -> tuple[QuantizedWeight, torch.Tensor]:
    """Of numbers in -12 to 12."""
    codes = (rows * 10).round().t().add(128).to(torch.uint8)
    scales, zeros = torch.full((1, len(rows)), 0.1, dtype=rows.dtype), torch.full((1, len(rows)), 128).to(torch.uint8)
    return QuantizedWeight(codes, scales, zeros, torch.zeros(len(codes), dtype=torch.int32), 8), rows.square().sum(1)


@given(seed=st.integers(0, 2**32 - 10), rows=st.integers(1, 40), channels=st.integers(1, 5))
def test_each_turn_rounds_what_is_best_given_the_errors_of_those_before(seed: int, rows: int, channels: int) -> None:
    root, weight = random(seed, rows + 5, rows), random(seed + 1, rows, channels)
    moment = root.T @ root
    factor = factor_of(moment)
    targets: list[torch.Tensor] = []

    def quantize(some: torch.Tensor) -> tuple[QuantizedWeight, torch.Tensor]:
        targets.append(some.clone())
        quantized, sums = to_tenths(some)
        return quantized, sums.sum(0, keepdim=True)

    quantized, sums = in_turns(weight, factor, quantize)
    assert len(targets) == min(rows, 8)
    errors = (quantized.dequantize(torch.float64) - weight)[factor.order]
    in_order = moment[factor.order][:, factor.order]
    edges = [0, *itertools.accumulate(len(each) for each in targets)]
    for (first, stop), target in zip(itertools.pairwise(edges), targets):
        best = -torch.linalg.solve(in_order[first:, first:], in_order[first:, :first] @ errors[:first])
        expected = weight[factor.order][first:stop] + best[: stop - first]
        torch.testing.assert_close(target, expected, atol=1e-7, rtol=1e-6)
    torch.testing.assert_close(sums, torch.cat(targets).square().sum().reshape(1))


@given(seed=st.integers(0, 2**32 - 10))
def test_outputs_that_are_used_together_lose_less(seed: int) -> None:
    """Derivatives of 48 outputs that lie in 6 directions, and some noise."""
    directions, x, weight = random(seed, 6, 48), random(seed + 1, 400, 32), random(seed + 2, 48, 32)
    derivatives = random(seed + 3, 2000, 6) @ directions + 0.1 * random(seed + 4, 2000, 48)
    halves = [half.T @ half for half in (derivatives[:1000], derivatives[1000:])]
    rows = factor_rows((halves[0], halves[1]), (1000, 1000))
    assert rows is not None
    config = QuantizeConfig(bits=3, group_size=16, quality="fast")
    shared = prepare_factor(x.T @ x, config)

    def error(rows: RowFactor | None) -> float:
        made = quantize_weight(weight, shared, config, rows=rows).weight
        difference = made.dequantize(torch.float64) - weight
        return float((difference.T @ (halves[0] + halves[1]) @ difference * shared.hessian).sum())

    assert error(rows) < 0.5 * error(None)


@given(seed=st.integers(0, 2**32 - 10), outputs=st.integers(16, 40), tokens=st.integers(100, 400))
def test_what_only_chance_ties_together_is_rounded_by_itself(seed: int, outputs: int, tokens: int) -> None:
    halves = [half.T @ half for half in random(seed, 2, tokens, outputs)]
    assert factor_rows((halves[0], halves[1]), (tokens, tokens)) is None


def test_rows_that_nothing_ties_together_come_out_as_without_turns() -> None:
    weight, x = random(0, 64, 32), random(1, 300, 32)
    config = QuantizeConfig(group_size=16)
    shared = prepare_factor(x.T @ x, config)
    rows = RowFactor(random(2, 64).argsort(), torch.eye(64, dtype=torch.float64))
    plain, turns = (quantize_weight(weight, shared, config, rows=each) for each in (None, rows))
    assert (plain.weight.codes == turns.weight.codes).float().mean() > 0.99
    assert turns.loss == pytest.approx(plain.loss, rel=1e-3)


def test_outputs_that_nothing_reads_get_no_feedback() -> None:
    directions = random(0, 2, 12)
    directions[:, 3] = 0
    moment = directions.T @ directions + 0.01 * torch.eye(12, dtype=torch.float64)
    moment[3] = moment[:, 3] = 0
    rows = factor_rows((moment, moment), (500, 500))
    assert rows is not None
    assert rows.order[-1] == 3
    assert torch.equal(rows.upper[:, -1].nonzero(), torch.tensor([[11]]))
    assert factor_rows((0 * moment, 0 * moment), (500, 500)) is None


def test_a_scale_that_overflows_is_told_as_without_turns() -> None:
    weight, x = random(0, 32, 16), random(1, 300, 16)
    weight[5] *= 1e30
    config = QuantizeConfig(group_size=16)
    moment = random(2, 100, 32).T @ random(2, 100, 32)
    with pytest.raises(CalibrationError, match=r"layer\.weight: a scale overflows"):
        quantize_weight(weight, prepare_factor(x.T @ x, config), config, rows=factor_of(moment))


@given(seed=st.integers(0, 2**32 - 10), size=st.floats(10, 1e6))
def test_rows_that_hardly_matter_do_not_move_far_for_others(seed: int, size: float) -> None:
    """Four of 48 rows have much larger derivatives."""
    x, weight = random(seed, 400, 32), random(seed + 1, 48, 32)
    derivatives = random(seed + 2, 4000, 6) @ random(seed + 3, 6, 48)
    derivatives[:, :4] *= size
    halves = derivatives[:2000].T @ derivatives[:2000], derivatives[2000:].T @ derivatives[2000:]
    rows = factor_rows(halves, (2000, 2000))
    assume(rows is not None)  # four rows may be too few to help each other
    config = QuantizeConfig(bits=4, group_size=16, quality="fast")
    shared = prepare_factor(x.T @ x, config)
    with_rows, plain = (quantize_weight(weight, shared, config, rows=each) for each in (rows, None))
    assert with_rows.relative_loss < 5 * plain.relative_loss
    difference = with_rows.weight.dequantize(torch.float64) - weight
    loss = float((difference @ shared.hessian * difference).sum())
    assert with_rows.loss == pytest.approx(loss / len(weight))
