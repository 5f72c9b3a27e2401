"""The gradient by the packed weight on CPUs: exact in every format and instruction set, traceable, without a dense
weight.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from gptq_backend import Kernel, QuantizedWeight, QuantLinear
from gptq_backend.kernels import PreparedWeight, cpu
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import LIMITS, ROOT, assert_passes_at, error, native, prepared

FORCED = os.environ.get("GPTQ_BACKEND_CPU_LEVEL")


def gradient(served: PreparedWeight, y_grad: Tensor) -> Tensor:
    return cpu.gradient(y_grad, *served.kernel.layout.arguments(served.spec, served.tensors))


@native
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    columns=st.integers(1, 300),
    outputs=st.integers(1, 300),
    size=st.sampled_from([1, 8, 24, 32, 48, 128, 200, 300]),
    rows=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 11, 23, 49, 97]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scales_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    sym=st.booleans(),
    act_order=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_any_format(bits, columns, outputs, size, rows, dtype, scales_dtype, sym, act_order, seed) -> None:
    torch.manual_seed(seed)
    weight = random_weight(bits, columns, outputs, min(size, columns), sym=sym, act_order=act_order)
    weight = QuantizedWeight(weight.codes, weight.scales.to(scales_dtype), weight.zeros, weight.g_idx, bits)
    y_grad = (torch.randn(rows, outputs) * torch.randn(outputs).exp()).to(dtype)
    expected = y_grad.double() @ weight.dequantize(torch.float64)
    # A result of few elements may be rounded worse than the average: compare it with its own exact value, rounded.
    slack = error(expected.to(dtype), expected)
    assert error(gradient(prepared(weight, cpu.KERNEL), y_grad), expected) < max(LIMITS[dtype], 1.5 * slack)


@native
@pytest.mark.skipif(FORCED is not None, reason="this is the run that such a test starts")
@pytest.mark.parametrize("level", cpu._cpu.levels()[:-1] if cpu._cpu else [])
def test_lower_instruction_sets_are_as_exact(level: str) -> None:
    assert_passes_at(level, __file__, "-k", "test_any_shape_any_format or test_every_code or test_not_finite")


@native
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_every_code_meets_every_zero(bits: int) -> None:
    """Largest sums: no integer overflows, and each code is where it belongs."""
    levels, outputs = 1 << bits, 300
    groups = min(levels, 20)
    codes = torch.arange(levels, dtype=torch.uint8).repeat(groups)[:, None].expand(-1, outputs)  # in every group
    zeros = ((torch.arange(groups)[:, None] * 13 + torch.arange(outputs)) % levels).to(torch.uint8)
    g_idx = torch.arange(groups, dtype=torch.int32).repeat_interleave(levels)
    weight = QuantizedWeight(codes.contiguous(), torch.ones(groups, outputs), zeros, g_idx, bits)
    y_grad = torch.full((3, outputs), -1.75)
    expected = y_grad.double() @ weight.dequantize(torch.float64)
    assert torch.equal(gradient(prepared(weight, cpu.KERNEL), y_grad).double(), expected)


@native
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("rows", [2, 9])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_not_finite_gradients_spoil_their_own_row_only(bad: float, rows: int, dtype: torch.dtype) -> None:
    served = prepared(random_weight(4, 90, 256, 30, act_order=True), cpu.KERNEL)
    y_grad = torch.randn(rows, 256, dtype=dtype)
    clean = gradient(served, y_grad)
    y_grad[1, 200] = bad
    found = gradient(served, y_grad)
    assert found[1].isnan().all()
    assert torch.equal(found[0], clean[0])
    assert torch.equal(found[2:], clean[2:])


@native
def test_extreme_magnitudes_keep_their_relative_error() -> None:
    weight = random_weight(4, 256, 40, 64)
    served = prepared(weight, cpu.KERNEL)
    for scale in (1e-25, 1e-5, 1e20, 1e30):
        y_grad = torch.randn(3, 40) * scale
        assert error(gradient(served, y_grad), y_grad.double() @ weight.dequantize(torch.float64)) < 1e-6
    assert (gradient(served, torch.zeros(3, 40)) == 0).all()


@native
@pytest.mark.parametrize("kernel", [cpu.KERNEL, cpu.W4A8], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("shape", [(0, 33), (33,), (2, 0, 33), (2, 3, 33)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_shapes(kernel: Kernel, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    weight = random_weight(4, 90, 33, 30, act_order=True)
    y_grad = torch.randn(shape, dtype=dtype)
    found = gradient(prepared(weight, kernel), y_grad)
    torch.testing.assert_close(found, y_grad @ weight.dequantize(dtype))


@native
def test_a_wrong_gradient_is_refused() -> None:
    served = prepared(random_weight(4, 64, 32, 32), cpu.KERNEL)
    with pytest.raises(ValueError, match="expected floating point with a last dimension of 32 on cpu"):
        gradient(served, torch.ones(2, 64))


@native
def test_views_are_read_as_they_are() -> None:
    weight = random_weight(4, 64, 32, 32)
    y_grad = torch.randn(32, 5).t()
    torch.testing.assert_close(gradient(prepared(weight, cpu.KERNEL), y_grad), y_grad @ weight.dequantize())


# -- autograd ----------------------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("kernel", ["cpu", "cpu_w4a8"])
def test_autograd_agrees_with_finite_differences(kernel: str) -> None:
    """In float64, whose products are those of the dense weight, also for gradients of gradients."""
    layer = QuantLinear.from_weight(random_weight(4, 12, 7, 4, act_order=True), backend=kernel)
    x = torch.randn(3, 12, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layer, x)
    assert torch.autograd.gradgradcheck(layer, x)


@native
def test_gradients_of_gradients_are_those_of_the_dense_layer() -> None:
    weight = random_weight(4, 90, 33, 30, act_order=True, sym=False)
    layer, dense = QuantLinear.from_weight(weight, backend="cpu"), weight.dequantize()

    def penalty(multiply) -> tuple[Tensor, Tensor]:
        torch.manual_seed(0)
        x = torch.randn(5, 90, requires_grad=True)
        (first,) = torch.autograd.grad(multiply(x).square().sum(), x, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), x)
        return first, second

    torch.testing.assert_close(penalty(layer), penalty(lambda x: x @ dense.t()), rtol=1e-4, atol=1e-3)


@native
def test_two_uses_in_one_graph_add_up() -> None:
    weight = random_weight(4, 64, 64, 32)
    layer, dense = QuantLinear.from_weight(weight, backend="cpu"), weight.dequantize()
    x, y_grad = torch.randn(5, 64, requires_grad=True), torch.randn(5, 64)
    layer(layer(x) + x).backward(y_grad)
    once = y_grad @ dense
    torch.testing.assert_close(x.grad, once @ dense + once, rtol=1e-4, atol=1e-3)


@native
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_gives_the_same_gradient(reentrant: bool) -> None:
    layer = QuantLinear.from_weight(random_weight(4, 64, 64, 32), torch.randn(64), backend="cpu")
    x = torch.randn(5, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(layer(x)).sum(), x)
    again = x.detach().requires_grad_()
    checkpoint(lambda x: layer(layer(x)), again, use_reentrant=reentrant).sum().backward()
    assert torch.equal(again.grad, expected)


@native
def test_compiles_with_its_backward() -> None:
    layer = QuantLinear.from_weight(random_weight(4, 64, 32, 32, act_order=True), torch.randn(32), backend="cpu")
    x = torch.randn(3, 64, requires_grad=True)
    (expected,) = torch.autograd.grad(layer(x).square().sum(), x)
    compiled = torch.compile(lambda x: layer(x).square().sum(), fullgraph=True, backend="aot_eager")
    (found,) = torch.autograd.grad(compiled(x), x)
    assert torch.equal(found, expected)


@native
def test_threads_do_not_change_the_result() -> None:
    served = prepared(random_weight(3, 512, 300, 128, act_order=True), cpu.KERNEL)
    y_grad, threads = torch.randn(130, 300), torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 5):
            torch.set_num_threads(count)
            found.append(gradient(served, y_grad))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@native
def test_backward_makes_no_dense_weight() -> None:
    """Peak memory of a process that calls backward on 64 MB of dense weight grows by a fraction of it."""
    code = """
import torch
from gptq_backend import QuantLinear
from tests.format.test_stored_tensors import random_weight

def peak():
    return int(next(line for line in open("/proc/self/status") if line.startswith("VmHWM")).split()[1]) << 10

layer = QuantLinear.from_weight(random_weight(4, 4096, 4096, 128), backend="cpu")
x = torch.randn(8, 4096, requires_grad=True)
layer(x).sum().backward()  # what the first call of anything takes
open("/proc/self/clear_refs", "w").write("5")  # the peak starts anew
before = peak()
layer(x).sum().backward()
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert int(done.stdout) < 8 << 20
