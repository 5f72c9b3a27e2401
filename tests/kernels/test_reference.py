"""The two operators: registration, gradients, shapes under tracing, dtypes, and inputs at the edges."""

from __future__ import annotations

import dataclasses
import inspect
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_backend import QuantLinear
from gptq_backend.format.stored_tensors import StoredSpec, encode
from gptq_backend.kernels import cpu
from gptq_backend.kernels import reference as ops
from gptq_backend.kernels.cuda import operators as cuda
from gptq_backend.kernels.triton import operators as triton_ops
from tests.format.test_stored_tensors import random_weight

CASES = {
    "plain": {},
    "act order": {"act_order": True},
    "ragged": {"columns": 90},
    "one group": {"size": 96},
    "symmetric": {"sym": True},
}


def case(name: str = "plain", bits: int = 4, checkpoint_format: str = "gptq") -> tuple[list[Any], Tensor]:
    """The arguments that both operators share, and the dense weight [N, K] in float64."""
    options = {"columns": 96, "outputs": 32, "size": 32, **CASES[name]}
    weight = random_weight(bits, **options)  # type: ignore[arg-type]
    spec, tensors = encode(weight, checkpoint_format)
    g_idx = tensors["g_idx"] if spec.act_order else None
    numbers = [spec.in_features, spec.bits, spec.group_size, spec.zero_offset, spec.planar]
    return [tensors["qweight"], tensors["qzeros"], tensors["scales"], g_idx, *numbers], weight.dequantize(torch.float64)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize(
    ("bits", "checkpoint_format"), [(2, "gptq"), (3, "gptq_v2"), (3, "gptq_p"), (4, "gptq"), (8, "gptq")]
)
def test_operators_agree_with_the_dense_weight(name: str, bits: int, checkpoint_format: str) -> None:
    if name == "ragged" and checkpoint_format == "gptq_p":
        pytest.skip("gptq_p stores whole runs of 32 channels")
    args, dense = case(name, bits, checkpoint_format)
    assert torch.equal(torch.ops.gptq_backend.dequantize(*args, torch.float64), dense.t())
    x, bias = torch.randn(5, dense.shape[1], dtype=torch.float64), torch.randn(32, dtype=torch.float64)
    assert torch.allclose(torch.ops.gptq_backend.gemm(x, *args, bias), x @ dense.t() + bias, atol=1e-12)


# Error of a sum of 96 products, relative to the norm of the output.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 1e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


@pytest.mark.parametrize("scales_dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_every_dtype_of_x_against_float64(dtype: torch.dtype, scales_dtype: torch.dtype) -> None:
    args, _ = case()
    args[2] = args[2].to(scales_dtype)
    dense = torch.ops.gptq_backend.dequantize(*args, torch.float64)
    x = torch.randn(7, 96).to(dtype)
    y = torch.ops.gptq_backend.gemm(x, *args, None)
    expected = x.double() @ dense
    assert y.dtype == dtype
    assert (y.double() - expected).norm() / expected.norm() < TOLERANCE[dtype]


@pytest.mark.parametrize("shape", [(0, 96), (96,), (1, 96), (2, 3, 96), (2, 0, 96)])
def test_shapes_of_x(shape: tuple[int, ...]) -> None:
    args, dense = case()
    x = torch.randn(shape, dtype=torch.float64)
    y = torch.ops.gptq_backend.gemm(x, *args, None)
    assert y.shape == (*shape[:-1], 32)
    assert torch.allclose(y, x @ dense.t(), atol=1e-12)


@pytest.mark.parametrize("transposed", [True, False])
def test_strided_x(transposed: bool) -> None:
    args, dense = case()
    x = torch.randn(96, 6, dtype=torch.float64).t() if transposed else torch.randn(6, 192, dtype=torch.float64)[:, ::2]
    assert torch.allclose(torch.ops.gptq_backend.gemm(x, *args, None), x @ dense.t(), atol=1e-12)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_a_dense_layer(name: str) -> None:
    args, dense = case(name)
    x = torch.randn(2, 3, dense.shape[1], dtype=torch.float64, requires_grad=True)
    bias = torch.randn(32, dtype=torch.float64, requires_grad=True)
    y = torch.ops.gptq_backend.gemm(x, *args, bias)
    upstream = torch.randn_like(y)
    got = torch.autograd.grad(y, (x, bias), upstream)
    expected = torch.autograd.grad(torch.nn.functional.linear(x, dense, bias), (x, bias), upstream)
    for mine, theirs in zip(got, expected, strict=True):
        assert torch.allclose(mine, theirs, atol=1e-12)


def test_bias_gradient_keeps_the_dtype_of_the_bias() -> None:
    args, _ = case()
    bias = torch.zeros(32, dtype=torch.float32, requires_grad=True)
    torch.ops.gptq_backend.gemm(torch.randn(3, 96).bfloat16(), *args, bias).sum().backward()
    assert bias.grad is not None
    assert bias.grad.dtype == torch.float32
    assert torch.equal(bias.grad, torch.full((32,), 3.0))


def test_fake_shapes_and_dtypes() -> None:
    args, _ = case("act order")
    mode = torch._subclasses.FakeTensorMode()
    fake = [mode.from_tensor(a) if isinstance(a, Tensor) else a for a in args]
    x = mode.from_tensor(torch.randn(2, 5, 96).bfloat16())
    y = torch.ops.gptq_backend.gemm(x, *fake, None)
    dense = torch.ops.gptq_backend.dequantize(*fake, torch.float16)
    assert (tuple(y.shape), y.dtype) == ((2, 5, 32), torch.bfloat16)
    assert (tuple(dense.shape), dense.dtype) == ((96, 32), torch.float16)


def test_slices_of_output_channels_join_without_a_seam(monkeypatch: pytest.MonkeyPatch) -> None:
    from gptq_backend.kernels import reference as ops

    args, dense = case("act order", bits=3)
    monkeypatch.setattr(ops, "_MAX_DENSE_ELEMENTS", 96 * 5)  # slices of 5 of the 32 channels
    x = torch.randn(4, 96, dtype=torch.float64)
    assert torch.allclose(torch.ops.gptq_backend.gemm(x, *args, None), x @ dense.t(), atol=1e-12)


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
@pytest.mark.parametrize("act_order", [False, True])
def test_quant_linear_compiles_without_a_graph_break(checkpoint_format: str, act_order: bool) -> None:
    weight = random_weight(4, 96, 32, 32, act_order=act_order)
    layer = QuantLinear.from_weight(weight, torch.randn(32), checkpoint_format)
    layer.prepare()
    torch.compiler.reset()  # earlier layers count towards the limit of recompilations
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    for rows in (1, 2, 5):  # also with a dynamic number of rows
        x = torch.randn(rows, 96)
        assert torch.equal(compiled(x), layer(x))
    x = torch.randn(3, 96, requires_grad=True)
    assert torch.equal(torch.autograd.grad(compiled(x).sum(), x)[0], torch.autograd.grad(layer(x).sum(), x)[0])


def test_spec_of_the_operators_is_complete() -> None:
    """Every field that changes how tensors are read must be an argument of the operators."""
    fields = {field.name for field in dataclasses.fields(StoredSpec)}
    seen = {"in_features", "bits", "group_size", "zero_offset", "planar"}
    from_tensors = {"out_features", "groups", "word_dtype", "scales_dtype", "act_order"}
    only_for_files = {"sym", "has_g_idx", "empty_g_idx", "has_bias", "bias_dtype", "g_idx_dtype"}
    assert fields == seen | from_tensors | only_for_files


@pytest.mark.parametrize(
    ("operator", "takes"),
    [
        ("gemm", ops.WeightFields),
        ("dequantize", ops.WeightFields),
        ("cpu_gemm", cpu.WeightFields),
        ("cpu_dequantize", cpu.WeightFields),
        ("cpu_moe_gemm", cpu.WeightFields),
        ("cuda_gemm", cuda.WeightFields),
        ("cuda_dequantize", cuda.WeightFields),
        ("triton_gemm", triton_ops.WeightFields),
        ("triton_moe_gemm", triton_ops.WeightFields),
    ],
)
def test_an_argument_that_moves_in_a_schema_moves_in_the_code(operator: str, takes: Any) -> None:
    """torch hands arguments over by position: two integers in each other's place raise no error."""
    schema = [argument.name for argument in getattr(torch.ops.gptq_backend, operator).default._schema.arguments]
    expected = list(inspect.signature(takes).parameters)
    first = schema.index(expected[0])
    assert schema[first : first + len(expected)] == expected
