"""The CUDA kernels as NVRTC compiles them: their PTX, run on the host, against float64.

test_cuda.py runs the same kernels as a host's compiler understands them; here NVIDIA's front end is in the loop, and
the kernels' own inline assembly. What is left out is the way from PTX to machine code (test_cuda_machine_code.py).
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from gptq_backend import QuantizedWeight
from gptq_backend.kernels.cuda import operators as cuda
from gptq_backend.kernels.cuda.nvrtc import Compiler
from gptq_backend.kernels.cuda.plan import Plan
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import LIMITS, error, exact, prepared
from tests.kernels.ptx.machine import Machine

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

WIDTHS = (2, 3, 4, 8)
# All kernels that the plans can name, with K shared among unlike numbers of warps and blocks; None: the dense weight.
PLANS = [
    *(Plan(strips, tokens, warps) for strips, tokens in ((1, 1), (1, 2), (2, 1), (2, 2)) for warps in (1, 3, 8)),
    *(Plan(0, tokens, splits=splits) for tokens in (2, 4, 8) for splits in (1, 5)),
    None,
]
# Every kind of tensor that the kernels may find.
FORMATS = list(itertools.product([True, False], [torch.float32, torch.bfloat16, torch.float16]))
# The part of its instructions that a kernel executes here, at least. The rest of the wide kernel is mostly copies of
# loops that the compiler has unrolled for trip counts that do not occur; of others, divisions of large numbers.
EXECUTED = {"skinny": 0.9, "wide": 0.4, "reduce": 0.85, "dequantize": 0.9, "gather": 1.0}
Load = Callable[[int, str], list[str]]


@pytest.fixture(scope="session")
def ptx(compiler: Compiler) -> dict[tuple[int, str], str]:
    """What was compiled, by bits and target."""
    return {}


@pytest.fixture
def load(ptx_driver: Machine, compiler: Compiler, ptx: dict[tuple[int, str], str]) -> Load:
    """Let the driver have the kernels for (bits, target) -> their names."""

    def load(bits: int, target: str) -> list[str]:
        if (bits, target) not in ptx:
            ptx[bits, target] = compiler.compile(bits, target).rstrip(b"\0").decode()
        return ptx_driver.load(ptx[bits, target])

    return load


def product(machine: Machine, weight: QuantizedWeight, x: Tensor, bias: Tensor | None, plan: Plan | None) -> Tensor:
    """x W^T + bias on the machine, by one plan. What nobody has written is NaN."""
    torch.use_deterministic_algorithms(True)
    try:
        with machine.memory(x, bias):
            served = prepared(weight, cuda.KERNEL)
            fields = cuda.WeightFields(*cuda.KERNEL.layout.arguments(served.spec, served.tensors))
            return cuda.planned_gemm(x, fields, bias, plan)
    finally:
        torch.use_deterministic_algorithms(False)


def check_random_product(machine: Machine, bits: int, dtype: torch.dtype, plan: Plan | None, seed: int) -> None:
    """A problem of any shape, against float64, some in two orders of the warps. seed: chooses the format, too."""
    torch.manual_seed(seed)
    choose = random.Random(seed).choice
    sym, scales_dtype = FORMATS[seed % len(FORMATS)]
    columns, outputs, rows = (
        choose([7, 63, 200, 384, 1000, 2300]),
        choose([1, 17, 40, 150]),
        choose([1, 8, 9, 17, 33, 65]),
    )
    size = choose([1, 32, 48, 128, columns])
    weight = random_weight(bits, columns, outputs, min(size, columns), seed, sym=sym, act_order=choose([True, False]))
    weight = QuantizedWeight(weight.codes, weight.scales.to(scales_dtype), weight.zeros, weight.g_idx, bits)
    x = (torch.randn(rows, columns) * torch.randn(columns).exp()).to(dtype)
    bias_dtype = choose([None, torch.float32, torch.bfloat16, torch.float16])
    bias = torch.randn(outputs).to(bias_dtype) if bias_dtype else None
    if plan:
        expected = exact(weight, x, bias)
    else:  # the dense weight and the bias are rounded
        dense = weight.dequantize(torch.float32).to(dtype).double()
        expected = x.double() @ dense.t() + (0 if bias is None else bias.to(dtype).double())
    slack = error(expected.to(dtype), expected)
    machine.seed(seed)
    y = product(machine, weight, x, bias, plan)
    assert error(y, expected) < max(LIMITS[dtype], 1.5 * slack), (seed, plan)
    if seed % 3 == 0:
        machine.seed(seed + 1000)
        assert torch.equal(product(machine, weight, x, bias, plan), y)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_any_shape_any_format_any_plan(bits: int, dtype: torch.dtype, load: Load, ptx_driver: Machine) -> None:
    names = load(bits, "compute_80")
    for number, plan in enumerate(PLANS):
        for seed in range(2 * len(FORMATS)):
            check_random_product(ptx_driver, bits, dtype, plan, 100 * number + seed)
    type_name = "bf16" if dtype == torch.bfloat16 else "f16"
    for name in names:
        _, kind, *_, of_type = name.split("_")
        if of_type in (type_name, "2"):  # 2: bytes of what is gathered
            counts = [count for _, count in ptx_driver.executed(name)]
            assert sum(map(bool, counts)) >= EXECUTED[kind] * len(counts), name


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plan", [Plan(1, 1, 4), Plan(2, 2), Plan(0, 8)])
def test_every_code_meets_every_zero(
    bits: int, dtype: torch.dtype, plan: Plan, load: Load, ptx_driver: Machine
) -> None:
    """Codes along K, zeros along N; x = 1 picks them one by one, and all values are exact in both types."""
    load(bits, "compute_80")
    count = 1 << bits
    outputs, columns = max(count, 48), max(count, 64)
    codes = (torch.arange(columns) % count).to(torch.uint8).unsqueeze(1).repeat(1, outputs)
    zeros = (torch.arange(outputs) % count).to(torch.uint8).unsqueeze(0)
    scales, g_idx = torch.ones(1, outputs, dtype=torch.float16), torch.zeros(columns, dtype=torch.int32)
    weight = QuantizedWeight(codes, scales, zeros, g_idx, bits)
    y = product(ptx_driver, weight, torch.eye(columns, dtype=dtype), None, plan)
    assert torch.equal(y.float(), codes.float() - zeros.float())


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_the_dense_weight_is_that_of_the_layer(bits: int, dtype: torch.dtype, load: Load, ptx_driver: Machine) -> None:
    load(bits, "compute_80")
    for act_order in (False, True):
        weight = random_weight(bits, 100, 40, 32, act_order=act_order)
        with ptx_driver.memory():
            served = prepared(weight, cuda.KERNEL)
            dense = cuda.dequantize(*cuda.KERNEL.layout.arguments(served.spec, served.tensors), dtype)
        assert torch.equal(dense.t(), weight.dequantize(torch.float32).to(dtype))


@pytest.mark.parametrize("bits", WIDTHS)
def test_the_kernels_for_turing(bits: int, load: Load, ptx_driver: Machine) -> None:
    """They have half as deep matrix instructions, and no asynchronous copies."""
    load(bits, "compute_75")
    for number, plan in enumerate(PLANS):
        check_random_product(ptx_driver, bits, torch.float16, plan, number)
