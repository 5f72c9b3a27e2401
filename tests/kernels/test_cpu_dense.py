"""Products with dense weights: exact to the stated error at every shape, dtype and level, and safe to call."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_backend.kernels import cpu
from gptq_backend.kernels.cpu_dense import Dense, Product
from tests.kernels.checks import LIMITS, assert_passes_at, error, native

pytestmark = native
dtypes = st.sampled_from(list(LIMITS))
sizes = st.integers(1, 150)


@given(st.integers(0, 19), sizes, sizes, dtypes, dtypes, st.sampled_from([None, *LIMITS]))
def test_every_shape_and_dtype_is_exact(
    rows: int, width: int, outputs: int, dtype: torch.dtype, of_x: torch.dtype, of_bias: torch.dtype | None
) -> None:
    torch.manual_seed(width)
    weight, x = torch.randn(outputs, width).to(dtype), torch.randn(rows, width).to(of_x)
    bias = None if of_bias is None else torch.randn(outputs).to(of_bias)
    expected = x.double() @ weight.double().t() + (0.0 if bias is None else bias.double())
    found = Product(Dense(weight, bias))(x)
    assert found.dtype is of_x
    assert found.shape == (rows, outputs)
    assert not rows or error(found, expected) <= LIMITS[of_x]


@pytest.mark.parametrize("dtype", LIMITS)
@pytest.mark.parametrize("width", [576, 2048, 4099])
def test_wide_weights_are_as_exact_as_torch(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(77, width).to(dtype), torch.randn(8, width).to(dtype)
    expected = x.double() @ weight.double().t()
    stock = error(torch.nn.functional.linear(x, weight), expected)
    assert error(Product(Dense(weight))(x), expected) <= 1.5 * stock


@pytest.mark.parametrize("dtype", LIMITS)
def test_a_row_gives_the_same_bits_alone_and_among_others(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    product, x = Product(Dense(torch.randn(101, 333).to(dtype))), torch.randn(11, 333).to(dtype)
    assert torch.equal(product(x), torch.cat([product(row[None]) for row in x]))


@pytest.mark.parametrize("dtype", LIMITS)
def test_infinities_and_nan_stay_in_their_rows(dtype: torch.dtype) -> None:
    x = torch.ones(5, 40, dtype=dtype)
    x[1, 39], x[3, 0] = float("inf"), float("nan")
    found = Product(Dense(torch.ones(9, 40, dtype=dtype)))(x)
    assert torch.isinf(found[1]).all()
    assert torch.isnan(found[3]).all()
    assert (found[[0, 2, 4]] == 40).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: Product(Dense(torch.ones(4, 8).t())), "expected \\[N, K\\] in rows"),
        (lambda: Product(Dense(torch.ones(4, 8, dtype=torch.int8))), "a weight is int8"),
        (lambda: Product(Dense(torch.ones(4, 8), torch.ones(5))), "a bias is float32 \\[5\\]"),
        (lambda: Product(Dense(torch.ones(4, 8)))(torch.ones(2, 7)), "with a last dimension of 8"),
        (lambda: Product(Dense(torch.ones(4, 8)))(torch.ones(2, 8, device="meta")), "on cpu"),
    ],
)
def test_what_does_not_fit_is_refused(call: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("level", cpu._cpu.levels()[:-1] if cpu._cpu else [])
def test_lower_instruction_sets_are_as_exact(level: str) -> None:
    assert_passes_at(level, str(Path(__file__)), "-k", "not lower")
