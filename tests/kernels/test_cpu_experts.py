"""All of a mixture's experts in one call: exact at every shape and dtype, and safe to call."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptq_backend.kernels import cpu, cpu_block
from gptq_backend.kernels.cpu_experts import ExpertMLPs
from gptq_backend.kernels.experts import Grouped
from tests.kernels.checks import LIMITS, native, prepared
from tests.kernels.test_cpu_block import REFERENCES, Dense, assert_close

pytestmark = native


def grouped(layers: list[Dense], bias_dtype: torch.dtype, kernel: Any = cpu.KERNEL) -> Grouped:
    biases = [None if layer.bias is None else layer.bias.to(bias_dtype) for layer in layers]
    return Grouped([prepared(layer.weight, kernel) for layer in layers], biases)


def dense(bits: int, columns: int, outputs: int, count: int, **kwargs: Any) -> list[Dense]:
    return [Dense(bits, columns, outputs, seed, **kwargs) for seed in range(count)]


@given(
    activation=st.sampled_from(list(cpu_block.ACTIVATIONS)),
    mlp=st.sampled_from(["gated", "joined", "plain"]),
    bits=st.tuples(*[st.sampled_from([2, 3, 4, 8])] * 2),
    act_order=st.booleans(),
    bias=st.booleans(),
    experts=st.integers(1, 5),
    top_k=st.integers(1, 3),
    tokens=st.sampled_from([0, 1, 2, 5, 30, 170]),
    hidden=st.integers(16, 90),
    inner=st.integers(16, 90),
    id_dtype=st.sampled_from([torch.int32, torch.int64]),
    dtype=st.sampled_from(list(LIMITS)),
    threads=st.integers(1, 3),
)
def test_experts_in_one_call_are_exact(
    activation, mlp, bits, act_order, bias, experts, top_k, tokens, hidden, inner, id_dtype, dtype, threads
) -> None:
    generator = torch.Generator().manual_seed(tokens)
    parts = 2 if mlp == "gated" else 1
    width = inner * (2 if mlp == "joined" else 1)
    first = dense(bits[0], hidden, width, parts * experts, bias=bias, act_order=act_order)
    down = dense(bits[1], inner, hidden, experts, bias=bias)
    x = torch.randn(tokens, hidden, generator=generator).to(dtype)
    ids = torch.randint(-1, experts + 1, (tokens, top_k), generator=generator)
    factors = torch.randn(tokens, top_k, generator=generator)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run = ExpertMLPs(grouped(first, torch.float32), grouped(down, torch.float32), activation)
        y = run(x, ids.to(id_dtype), factors)
    finally:
        torch.set_num_threads(before)
    assert y.dtype == dtype
    assert_close(y, expected(first, down, experts, REFERENCES[activation], x, ids, factors), steps=4)


def expected(
    first: list[Dense],
    down: list[Dense],
    experts: int,
    activation: Callable[[Tensor], Tensor],
    x: Tensor,
    ids: Tensor,
    factors: Tensor,
) -> Tensor:
    """In float64, rounded where the call stores something."""
    y = torch.zeros(x.shape, dtype=torch.float64)
    for token, slot in ids.ge(0).logical_and(ids < experts).nonzero().tolist():
        expert = int(ids[token, slot])
        outputs = torch.cat([each(x[token].double()) for each in first[expert::experts]]).to(x.dtype).double()
        inner = down[0].linear.in_features
        middle = activation(outputs[:inner])
        if len(outputs) > inner:
            middle = middle * outputs[inner:]
        result = down[expert](middle.to(x.dtype).double()).to(x.dtype).double()
        y[token] += float(factors[token, slot]) * result
    return y


@pytest.fixture(scope="module")
def run() -> ExpertMLPs:
    return ExpertMLPs(grouped(dense(4, 32, 48, 6), torch.float32), grouped(dense(4, 48, 32, 3), torch.float32), "silu")


ONES = torch.ones(2, 32)
IDS = torch.zeros(2, 1, dtype=torch.int64)


@pytest.mark.parametrize(
    ("x", "ids", "factors", "message"),
    [
        (torch.ones(2, 31), IDS, torch.ones(2, 1), "x is .* a last dimension of 32"),
        (ONES.double(), IDS, torch.ones(2, 1), "x is float64"),
        (ONES[None], IDS, torch.ones(2, 1), r"expected \[T, H\]"),
        (ONES, IDS[:1], torch.ones(1, 1), r"int32 or int64 \[T, k\]"),
        (ONES, IDS.short(), torch.ones(2, 1), r"ids are int16"),
        (ONES, IDS, torch.ones(2, 2), r"factors float32 \[2, 2\]"),
        (ONES, IDS, torch.ones(2, 1, device="meta"), "on meta"),
    ],
)
def test_what_does_not_fit_is_an_error(run: ExpertMLPs, x: Tensor, ids: Tensor, factors: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(x, ids, factors)


@pytest.mark.parametrize(
    ("first", "down", "activation", "message"),
    [
        ((32, 40, 6), (48, 32, 3), "silu", "they map 32 to 80 channels, and 48 to 32"),
        ((32, 48, 6), (48, 31, 3), "silu", "and 48 to 31"),
        ((32, 48, 6), (48, 32, 3), "mish", "activation='mish'; expected one of silu"),
    ],
)
def test_experts_that_do_not_fit_together_are_an_error(
    first: tuple[int, ...], down: tuple[int, ...], activation: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ExpertMLPs(grouped(dense(4, *first), torch.float32), grouped(dense(4, *down), torch.float32), activation)


def test_biases_of_another_kind_are_no_part_of_it() -> None:
    first = dense(4, 32, 48, 6, bias=True)
    with pytest.raises(ValueError, match="biases are torch.float64"):
        ExpertMLPs(grouped(first, torch.float64), grouped(dense(4, 48, 32, 3), torch.float32), "silu")


def test_what_one_token_sees_stays_with_it(run: ExpertMLPs) -> None:
    """NaN and infinity in one row, and in a factor of a token."""
    x, factors = torch.randn(3, 32), torch.ones(3, 2)
    ids = torch.tensor([[0, 1], [0, 1], [2, 2]])
    plain = run(x, ids, factors)
    bad = x.clone()
    bad[1, 3] = float("nan")
    factors_2 = factors.clone()
    factors_2[2, 0] = float("inf")
    y = run(bad, ids, factors_2)
    assert torch.equal(y[0], plain[0])
    assert y[1].isnan().all()
    assert not y[2].isfinite().any()


def test_weights_with_int8_activations_run_in_one_call() -> None:
    """To the precision that those have."""
    first, down = dense(4, 64, 48, 4), dense(4, 48, 64, 2)
    run = ExpertMLPs(grouped(first, torch.float32, cpu.W4A8), grouped(down, torch.float32, cpu.W4A8), "silu")
    x, ids, factors = torch.randn(5, 64), torch.tensor([[0], [1], [0], [1], [1]]), torch.ones(5, 1)
    wanted = expected(first, down, 2, REFERENCES["silu"], x, ids, factors)
    assert 1e-4 < float((run(x, ids, factors) - wanted).norm() / wanted.norm()) < 2e-2


def test_the_weights_are_kept_alive(run: ExpertMLPs) -> None:
    x, ids, factors = torch.randn(2, 32), torch.tensor([[0], [2]]), torch.ones(2, 1)

    def made() -> ExpertMLPs:
        layers = grouped(dense(4, 32, 48, 6), torch.float32), grouped(dense(4, 48, 32, 3), torch.float32)
        return ExpertMLPs(*layers, "silu")

    assert torch.equal(made()(x, ids, factors), run(x, ids, factors))


def test_tensors_in_pieces_are_read(run: ExpertMLPs) -> None:
    x, ids, factors = (
        torch.randn(4, 64)[:, ::2],
        torch.tensor([[0, 1], [2, 0], [1, 1], [0, 2]]).t().contiguous().t(),
        (torch.rand(2, 4).t().bfloat16()),
    )
    assert torch.equal(run(x, ids, factors), run(x.clone(), ids.clone(), factors.float()))
