"""The kernels of the column loop in Triton's interpreter, against torch's loop. test_triton.py starts these tests."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptq_backend import QuantizeConfig
from gptq_backend.algorithm import columns, gptq, refine, scale_search
from gptq_backend.algorithm import columns_triton as triton_columns
from gptq_backend.algorithm.grid import Grid
from tests.algorithm.test_gptq import ORDERS, assert_identical, layer, loss, run


def kernel(
    rest: Tensor,
    spread: Tensor,
    grids: Grid,
    groups: Tensor,
    centred: Tensor | None = None,
    start: tuple[Tensor, Tensor] | None = None,
) -> None:
    triton_columns.round_columns(rest, spread, grids, groups, centred, start)


def use_kernels(patch: pytest.MonkeyPatch) -> list[str]:
    """-> what is launched from now on, in order."""
    launched: list[str] = []

    def noted(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args: [launched.append(function.__name__), function(*args)][1]

    for module in (gptq, refine, scale_search):
        patch.setattr(module, "round_columns", noted(kernel))
    patch.setattr(scale_search, "rounding_costs", noted(triton_columns.rounding_costs))
    return launched


def random_grids(groups: int, width: int, dtype: torch.dtype) -> Grid:
    scale = (torch.rand(groups, width) * 0.2 + 0.05).half().to(dtype)
    scale *= torch.where(torch.rand_like(scale) < 0.5, -1, 1)
    zero = torch.randint(0, 16, scale.shape).to(dtype)
    return Grid(scale, zero, -zero, 15 - zero)


@settings(max_examples=12)
@given(
    count=st.sampled_from([1, 5, 32, 130]),
    width=st.sampled_from([1, 18]),
    groups=st.integers(1, 3),
    dtype=st.sampled_from([torch.float64, torch.float32]),
    descent=st.booleans(),
    wanted=st.booleans(),
)
def test_any_shape_rounds_as_the_loop_in_torch(count, width, groups, dtype, descent, wanted) -> None:
    rest, spread = torch.randn(count, width, dtype=dtype), torch.randn(count, count, dtype=dtype) / count
    spread = spread.t()  # a triangular solve gives its result by columns
    grids = random_grids(groups, width, dtype)
    of_column = torch.randint(0, groups, (count,), dtype=torch.int32)
    start = (torch.randn(count, width, dtype=dtype), torch.rand(count, dtype=dtype)) if descent else None
    results = []
    for function in (kernel, columns.round_columns):
        errors, codes = rest.clone(), torch.full_like(rest, 99) if wanted else None
        function(errors, spread, grids, of_column, codes, start)
        results.append((errors, codes))
    (errors, codes), (expected, expected_codes) = results
    # One near-tie that falls the other way changes the rest of its output channel: none in float64.
    same = torch.ones(width, dtype=torch.bool)
    if wanted and dtype == torch.float32:
        same = (codes == expected_codes).all(0)
        assert same.double().mean() > 0.9
    if wanted:
        assert torch.equal(codes[:, same], expected_codes[:, same])
    if wanted or dtype == torch.float64:
        torch.testing.assert_close(
            errors[:, same], expected[:, same], rtol=0, atol=1e-3 * torch.finfo(dtype).eps ** 0.5
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("shape", [(1, 1), (24, 70), (130, 5)])
def test_costs_of_plain_rounding(shape: tuple[int, int], dtype: torch.dtype) -> None:
    values, cost = torch.randn(shape, dtype=dtype), torch.rand(shape[0], dtype=dtype)
    grids = random_grids(7, shape[1], dtype)
    expected = columns.rounding_costs(values.double(), cost.double(), grids.map(Tensor.double))
    torch.testing.assert_close(triton_columns.rounding_costs(values, cost, grids).double(), expected, rtol=1e-5, atol=0)


def test_ties_go_to_the_even_code() -> None:
    values = torch.tensor([[-1.5, -0.5, 0.5, 1.5, 2.5, 6.5, 9.0, -9.0]])
    one = torch.ones_like(values)
    codes = torch.empty_like(values)
    kernel(values, torch.zeros(1, 1), Grid(one, 0 * one, -8 * one, 7 * one), torch.zeros(1).int(), codes)
    assert codes.tolist() == [[-2, 0, 0, 2, 2, 6, 7, -8]]


FORMATS = [(4, True, 24), (3, False, 32), (2, True, -1)]


@pytest.mark.parametrize(("order", "form"), list(zip(ORDERS, FORMATS * 2)))
def test_a_layer_gets_the_codes_of_the_plain_loop(order: str, form: tuple[int, bool, int], monkeypatch) -> None:
    bits, sym, group_size = form
    config = QuantizeConfig(bits=bits, sym=sym, group_size=group_size, quality="fast", **ORDERS[order])
    weight, hessian = layer(seed=bits, outputs=16)
    expected = run(weight, hessian, config).weight
    launched = use_kernels(monkeypatch)
    assert_identical(run(weight, hessian, config).weight, expected)
    assert set(launched) == {"kernel", "rounding_costs"}


def test_in_float32_as_on_a_gpu_a_layer_is_as_good(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of the default quality: the search with feedback, the loop, the refinement."""
    config = QuantizeConfig(bits=3, group_size=24, **ORDERS["static desc_act"])
    weight, hessian = layer(seed=8, outputs=16)
    expected = run(weight, hessian, config)
    launched = use_kernels(monkeypatch)
    monkeypatch.setattr(gptq, "_working_dtype", lambda tensor: torch.float32)
    result = run(weight.float(), hessian.float(), config)
    assert launched.count("kernel") > 6
    assert float((result.weight.codes == expected.weight.codes).double().mean()) > 0.97
    ratio = loss(result.weight, weight, hessian) / loss(expected.weight, weight, hessian)
    assert ratio == pytest.approx(1, abs=5e-3)
