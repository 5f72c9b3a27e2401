"""The Triton kernels in Triton's interpreter, against float64. test_triton.py starts these tests.

The interpreter multiplies bf16 wrongly, without a word: bf16 is left to the compiler and to a GPU.
"""

from __future__ import annotations

import pytest
import torch
import triton.testing
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptq_backend import QuantizedWeight
from gptq_backend.kernels.expert_routing import sort_by_expert
from gptq_backend.kernels.triton import operators as triton_ops
from gptq_backend.kernels.triton import plan as triton_plan
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import LIMITS, error, exact, prepared
from tests.kernels.test_experts import CPU, IDS, check_experts, check_opcheck

# N, K and group sizes that no tile divides, and some that it does.
SHAPES = [
    (1, 1, 1),
    (33, 5, 8),
    (50, 17, 50),
    (90, 40, 32),
    (96, 33, 48),
    (300, 24, 200),
    (530, 20, 128),
    (640, 130, 128),
]


@settings(max_examples=40)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    shape=st.sampled_from(SHAPES),
    rows=st.sampled_from([1, 2, 17]),
    dtype=st.sampled_from([torch.float32, torch.float16]),
    scales_dtype=st.sampled_from([torch.float32, torch.float16]),
    sym=st.booleans(),
    act_order=st.booleans(),
    with_bias=st.booleans(),
)
def test_any_shape_any_format(bits, shape, rows, dtype, scales_dtype, sym, act_order, with_bias) -> None:
    columns, outputs, size = shape
    weight = random_weight(bits, columns, outputs, size, act_order=act_order, sym=sym)
    weight = QuantizedWeight(weight.codes, weight.scales.to(scales_dtype), weight.zeros, weight.g_idx, bits)
    x, bias = torch.randn(rows, columns).to(dtype), torch.randn(outputs).to(dtype) if with_bias else None
    served = prepared(weight, triton_ops.KERNEL)
    expected = exact(weight, x, bias)
    slack = error(expected.to(dtype), expected)
    assert error(served.multiply(x, bias), expected) < max(LIMITS[dtype], 1.5 * slack)


@pytest.mark.parametrize("rows", [1, 5])
def test_every_number_of_splits(rows: int) -> None:
    weight = random_weight(4, 640, 40, 128)
    served = prepared(weight, triton_ops.KERNEL)
    _, spec, tensors, _ = served
    x = torch.randn(rows, 640)
    layout = triton_ops.WeightFields(*triton_ops.KERNEL.layout.arguments(spec, tensors))
    tile, _ = triton_plan.plan(rows, 40, layout.slabs, 4, 4, CPU)
    for splits in range(1, layout.slabs + 1):
        y = triton_ops._multiply(x, layout, None, tile, splits)
        assert error(y, exact(weight, x, None)) < 1e-6


def test_groups_of_unequal_sizes() -> None:
    """What a tensor-parallel slice of an act-order layer looks like."""
    weight = random_weight(4, 96, 20, 32)
    g_idx = torch.tensor([0] * 50 + [1] * 5 + [2] * 41, dtype=torch.int32)[torch.randperm(96)]
    weight = QuantizedWeight(weight.codes, weight.scales, weight.zeros, g_idx, 4)
    served = prepared(weight, triton_ops.KERNEL)
    _, _, tensors, _ = served
    assert "groups" in tensors
    for rows in (1, 3):
        x = torch.randn(rows, 96)
        assert error(served.multiply(x), exact(weight, x, None)) < 1e-6


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_many_rows_and_float64_go_through_the_dense_weight(bits: int, monkeypatch) -> None:
    monkeypatch.setattr(triton_ops, "_MAX_DENSE_ELEMENTS", 90 * 128)
    weight = random_weight(bits, 90, 150, 32, act_order=True)
    served = prepared(weight, triton_ops.KERNEL)
    _, spec, tensors, _ = served
    bias = torch.randn(150)
    for x, limit in ((torch.randn(2, 90, dtype=torch.float64), 1e-14), (torch.randn(600, 90), 1e-6)):
        assert error(served.multiply(x, bias), exact(weight, x, bias)) < limit
    dense = triton_ops.dequantize(*triton_ops.KERNEL.layout.arguments(spec, tensors), torch.float64)
    assert torch.equal(dense, weight.dequantize(torch.float64).t())


@pytest.mark.parametrize("rows", [2, 9])
def test_not_finite_activations_spoil_their_own_row_only(rows: int) -> None:
    weight = random_weight(4, 256, 40, 64)
    served = prepared(weight, triton_ops.KERNEL)
    x = torch.randn(rows, 256)
    clean = served.multiply(x)
    x[1, 77] = float("nan")
    y = served.multiply(x)
    assert y[1].isnan().all()
    assert torch.equal(y[0], clean[0])
    assert torch.equal(y[2:], clean[2:])


@pytest.mark.parametrize("shape", [(0, 64), (64,), (2, 0, 64), (2, 3, 64)])
def test_shapes_of_x(shape: tuple[int, ...]) -> None:
    weight = random_weight(4, 64, 32, 32)
    served = prepared(weight, triton_ops.KERNEL)
    x = torch.randn(shape)
    y = served.multiply(x)
    assert y.shape == (*shape[:-1], 32)
    assert not x.numel() or error(y, exact(weight, x, None)) < 1e-6


def test_operators_pass_opcheck() -> None:
    served = prepared(random_weight(4, 90, 33, 30, act_order=True), triton_ops.KERNEL)
    _, spec, tensors, _ = served
    layout = triton_ops.KERNEL.layout.arguments(spec, tensors)
    x, bias = torch.randn(2, 1, 90, requires_grad=True), torch.randn(33, requires_grad=True)
    torch.library.opcheck(torch.ops.gptq_backend.triton_gemm.default, (x, *layout, bias))
    inference = torch.ops.gptq_backend.triton_gemm_inference.default
    torch.library.opcheck(inference, (x.detach(), *layout, bias.detach()))
    torch.library.opcheck(torch.ops.gptq_backend.triton_dequantize.default, (*layout, torch.float32))


def test_autotuning_tries_and_remembers(monkeypatch: pytest.MonkeyPatch) -> None:
    tried = []
    monkeypatch.setattr(triton.testing, "do_bench", lambda run: tried.append(run()) or len(tried))
    monkeypatch.setattr(triton_ops, "AUTOTUNE", True)
    monkeypatch.setattr(triton_ops, "_tuned", {})
    weight = random_weight(4, 256, 40, 64)
    served = prepared(weight, triton_ops.KERNEL)
    x = torch.randn(2, 256)
    for _ in range(2):
        assert error(served.multiply(x), exact(weight, x, None)) < 1e-6
    assert len(tried) > 5
    assert all(error(y, exact(weight, x, None)) < 1e-6 for y in tried)
    assert len(triton_ops._tuned) == 1


@pytest.mark.parametrize("ids", IDS, ids=lambda ids: str(tuple(ids.shape)))
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize(("bits", "dtype"), [(3, torch.float32), (4, torch.float16)])
def test_experts(bits: int, act_order: bool, dtype: torch.dtype, ids: Tensor) -> None:
    check_experts(triton_ops.KERNEL, bits, act_order, dtype, ids, parts=2 if act_order else 1)


def test_experts_pass_opcheck() -> None:
    order, experts = sort_by_expert(torch.tensor([[0, 1], [1, 0]]), 4, 16)
    check_opcheck(triton_ops.KERNEL, torch.ops.gptq_backend.triton_moe_gemm.default, order, experts, 2)
