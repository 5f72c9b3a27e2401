"""Rows of a packed weight by their numbers, on every row of the kernel table: exactly those of the dense weight."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptq_backend import KERNELS, PackedWeight, QuantizedWeight
from gptq_backend.kernels import PreparedWeight, reference
from gptq_backend.kernels.cuda import operators as cuda
from gptq_backend.kernels.triton import operators as triton
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import packed, prepared

CPU = torch.device("cpu")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


@st.composite
def weights(draw: st.DrawFn) -> QuantizedWeight:
    columns, rows = draw(st.integers(1, 150)), draw(st.integers(1, 70))
    size = draw(st.integers(1, columns))
    return random_weight(
        draw(st.sampled_from([2, 3, 4, 8])),
        columns,
        rows,
        size,
        act_order=draw(st.booleans()),
        sym=draw(st.booleans()),
    )


def elsewhere(operators: object, weight: PackedWeight) -> Callable[[Tensor, torch.dtype], Tensor]:
    """The lookup of a row that serves no CPU: it is plain torch over that row's layout, which can be made here."""
    kernel = operators.KERNEL  # type: ignore[attr-defined]
    layout = kernel.layout.arguments(weight.spec, kernel.prepare(weight))
    return lambda ids, dtype: operators.look_up(ids, *layout, dtype)  # type: ignore[attr-defined]


@settings(max_examples=60, deadline=None)
@given(weight=weights(), data=st.data())
def test_rows_are_those_of_the_dense_weight(weight: QuantizedWeight, data: st.DataObject) -> None:
    outputs = weight.codes.shape[1]
    shape = data.draw(st.sampled_from([(), (1, 1), (2, 5), (0,)]))
    ids = torch.randint(outputs, shape, dtype=data.draw(st.sampled_from([torch.int64, torch.int32])))
    given = packed(weight)
    ways = [PreparedWeight.of(given, row).look_up for row in KERNELS if row.supports(given.spec, CPU) is None]
    for dtype in DTYPES:
        wide = torch.promote_types(dtype, torch.float32)
        for look_up in [*ways, elsewhere(cuda, given), elsewhere(triton, given)]:
            found = look_up(ids, dtype)
            assert found.dtype == dtype
            assert torch.equal(found, weight.dequantize(torch.float32)[ids.long()].to(dtype)) or (
                wide == torch.float64 and torch.allclose(found, weight.dequantize(wide)[ids.long()], rtol=1e-6, atol=0)
            )


@settings(max_examples=60, deadline=None)
@given(weight=weights(), data=st.data())
def test_input_channels_are_those_of_the_dense_weight(weight: QuantizedWeight, data: st.DataObject) -> None:
    """An embedding as GPTQModel writes it: tokens are the input channels."""
    served = prepared(weight, reference.KERNEL)
    shape = data.draw(st.sampled_from([(), (1, 1), (2, 5), (0,)]))
    ids = torch.randint(weight.codes.shape[0], shape)
    for dtype in (torch.float32, torch.bfloat16):
        found = reference.look_up_input(ids, served, dtype, served.tensors)
        assert torch.equal(found, weight.dequantize().t()[ids].to(dtype))


@pytest.mark.parametrize("row", [row for row in KERNELS if row.name in ("cpu", "reference")], ids=lambda row: row.name)
@pytest.mark.parametrize("bad", [-1, 40])
def test_a_token_that_does_not_exist_is_an_error(row: object, bad: int) -> None:
    served = prepared(random_weight(4, 64, 40, 32), row)  # type: ignore[arg-type]
    with pytest.raises(IndexError, match=rf"token id {bad} is not in the vocabulary of 40"):
        served.look_up(torch.tensor([0, bad]), torch.float32)
    with pytest.raises(ValueError, match="expected int32 or int64"):
        served.look_up(torch.tensor([0.5]), torch.float32)


def test_a_compiled_lookup_is_the_same() -> None:
    served = prepared(random_weight(4, 64, 40, 32), next(row for row in KERNELS if row.name == "reference"))
    ids = torch.tensor([[3, 0, 39]])
    compiled = torch.compile(lambda x: served.look_up(x, torch.bfloat16) * 2, backend="eager", fullgraph=True)
    assert torch.equal(compiled(ids), served.look_up(ids, torch.bfloat16) * 2)
