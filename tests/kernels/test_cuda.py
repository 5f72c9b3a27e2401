"""The CUDA kernels without a GPU: the very kernels, run thread by thread on the host.

The machine code they become is in test_cuda_machine_code.py, what needs a GPU in tests/gpu.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptq_backend import QuantizedWeight
from gptq_backend.format import encode, read_packed
from gptq_backend.kernels import PreparedWeight, reference
from gptq_backend.kernels.cuda import operators as cuda
from gptq_backend.kernels.cuda import plan as cuda_plan
from gptq_backend.kernels.cuda.plan import Gpu, Plan
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import LIMITS, assert_same_packed, error, exact, prepared
from tests.kernels.emulator import Emulator

# All kernels that the plans can name, with K shared among unlike numbers of warps and blocks.
PLANS = [
    *(Plan(strips, tokens, warps) for strips, tokens in ((1, 1), (1, 2), (2, 1), (2, 2)) for warps in (1, 3, 8)),
    *(Plan(0, tokens, splits=splits) for tokens in (2, 4, 8) for splits in (1, 3)),
    None,
]


@pytest.fixture
def poisoned() -> Iterator[None]:
    """Every tensor that nobody has written holds NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def multiply(served: PreparedWeight, x: Tensor, bias: Tensor | None, plan: Plan | None) -> Tensor:
    fields = cuda.WeightFields(*cuda.KERNEL.layout.arguments(served.spec, served.tensors))
    return cuda.planned_gemm(x, fields, bias, plan)


# -- layout ------------------------------------------------------------------------------------------------------------


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    columns=st.integers(1, 300),
    outputs=st.integers(1, 70),
    size=st.sampled_from([1, 8, 24, 32, 48, 64, 96, 128, 300]),
    sym=st.booleans(),
    act_order=st.booleans(),
    word_dtype=st.sampled_from([torch.int32, torch.int8, torch.int64]),
    seed=st.integers(0, 99),
)
def test_repacking_is_undone_bit_for_bit(bits, columns, outputs, size, sym, act_order, word_dtype, seed) -> None:
    torch.manual_seed(seed)
    weight = random_weight(bits, columns, outputs, min(size, columns), sym=sym, act_order=act_order)
    if act_order and seed % 2:  # groups of unlike sizes, some of them empty
        weight.g_idx.random_(0, len(weight.scales))
    given = read_packed(*encode(weight, "gptq", word_dtype), "layer")
    assert_same_packed(PreparedWeight.of(given, cuda.KERNEL).unprepare(), given)


def test_padding_stays_small() -> None:
    """Bytes in the kernel's layout, against those of the codes and scales alone."""
    for size in (32, 64, 128, 4096):
        for act_order in (False, True):
            weight = random_weight(4, 4096, 64, size, act_order=act_order)
            served = prepared(weight, cuda.KERNEL)
            _, spec, tensors, _ = served
            ideal = weight.codes.numel() / 2 + weight.scales.numel() * 2
            assert tensors["qweight"].nbytes + tensors["scales"].nbytes == ideal, spec
    # A shard of an act-order layer holds half of each group, more or less.
    weight = random_weight(4, 2048, 64, 64, act_order=True)
    weight.g_idx.random_(0, len(weight.scales))
    served = prepared(weight, cuda.KERNEL)
    _, spec, tensors, _ = served
    assert tensors["qweight"].nbytes + tensors["scales"].nbytes < 1.45 * encode(weight)[0].nbytes


# -- arithmetic --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_every_code_meets_every_zero(bits: int, dtype: torch.dtype, driver: Emulator) -> None:
    """Codes along K, zeros along N; x = 1 picks them one by one, and all values are exact in every type."""
    count = 1 << bits
    outputs, columns = max(count, 48), max(count, 64)
    codes = (torch.arange(columns) % count).to(torch.uint8).unsqueeze(1).repeat(1, outputs)
    zeros = (torch.arange(outputs) % count).to(torch.uint8).unsqueeze(0)
    g_idx = torch.zeros(columns, dtype=torch.int32)
    weight = QuantizedWeight(codes, torch.ones(1, outputs, dtype=torch.float16), zeros, g_idx, bits)
    served = prepared(weight, cuda.KERNEL)
    _, _, tensors, _ = served
    expected = codes.float() - zeros.float()
    assert torch.equal(served.multiply(torch.eye(columns, dtype=dtype), None).float(), expected)
    dense = cuda.dequantize(
        *(tensors.get(name) for name in ("qweight", "scales", "zeros", "perm")),
        columns, outputs, bits, dtype,
    )  # fmt: skip
    assert torch.equal(dense.float(), expected)
    if dtype != torch.float32:
        for plan in (Plan(1, 1, 2), Plan(0, 4)):
            assert torch.equal(multiply(served, torch.eye(columns, dtype=dtype), None, plan).float(), expected)


@pytest.mark.filterwarnings("ignore::UserWarning")
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    columns=st.integers(1, 600),
    outputs=st.integers(1, 150),
    size=st.sampled_from([1, 32, 48, 64, 128, 200, 600]),
    rows=st.sampled_from([1, 2, 8, 9, 16, 17, 33, 65]),
    dtype=st.sampled_from([torch.float16, torch.bfloat16]),
    scales_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    sym=st.booleans(),
    act_order=st.booleans(),
    with_bias=st.booleans(),
    plan=st.sampled_from(PLANS),
    seed=st.integers(0, 99),
)
def test_any_shape_any_format_any_plan(
    driver: Emulator, bits, columns, outputs, size, rows, dtype, scales_dtype, sym, act_order, with_bias, plan, seed
) -> None:
    torch.manual_seed(seed)
    weight = random_weight(bits, columns, outputs, min(size, columns), sym=sym, act_order=act_order)
    weight = QuantizedWeight(weight.codes, weight.scales.to(scales_dtype), weight.zeros, weight.g_idx, bits)
    x = (torch.randn(rows, columns) * torch.randn(columns).exp()).to(dtype)
    bias = torch.randn(outputs).to(dtype) if with_bias else None
    expected = exact(weight, x, bias)
    slack = error(expected.to(dtype), expected)
    torch.use_deterministic_algorithms(True)  # fills what nobody has written with NaN
    try:
        served = prepared(weight, cuda.KERNEL)
        results = []
        for order in (seed, seed + 1000):
            driver.seed(order)
            results.append(multiply(served, x, bias, plan))
    finally:
        torch.use_deterministic_algorithms(False)
    # Through the dense weight, that weight is rounded too.
    assert error(results[0], expected) < max(LIMITS[dtype], (1.5 if plan else 3) * slack)
    assert torch.equal(*results)


@pytest.mark.parametrize("plan", [Plan(1, 2, 1), Plan(2, 1, 2), Plan(0, 2), Plan(0, 8)])
@pytest.mark.parametrize("size", [32, 96, 128, 384])
def test_more_tiles_than_are_under_way_at_once(plan: Plan, size: int, driver: Emulator) -> None:
    weight = random_weight(4, 2300, 20, size)
    x = torch.randn(2, 2300, dtype=torch.float16)
    assert error(multiply(prepared(weight, cuda.KERNEL), x, None, plan), exact(weight, x)) < LIMITS[torch.float16]


@pytest.mark.parametrize("plan", [Plan(1, 1, 4), Plan(0, 2, splits=2), None])
def test_a_row_that_is_not_finite_leaves_the_others_alone(plan: Plan | None, driver: Emulator) -> None:
    weight = random_weight(4, 200, 40, 64)
    served = prepared(weight, cuda.KERNEL)
    x = torch.randn(5, 200, dtype=torch.float16)
    clean = multiply(served, x, None, plan)
    x[2, 7] = float("nan")
    dirty = multiply(served, x, None, plan)
    assert dirty[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(dirty[keep], clean[keep])


def test_a_machine_without_a_gpu_is_told_so(driver: Emulator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = prepared(random_weight(4, 96, 40, 32), reference.KERNEL).spec
    assert cuda.supports(spec, torch.device("cuda")) == "torch sees no CUDA device"
    assert cuda.supports(spec, torch.device("cpu")) == "serves NVIDIA GPUs"


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)])
def test_no_rows(shape: tuple[int, ...], driver: Emulator) -> None:
    served = prepared(random_weight(4, 96, 40, 32), cuda.KERNEL)
    assert served.multiply(torch.ones(shape), None).shape == (*shape[:-1], 40)


def test_views_that_start_anywhere(driver: Emulator) -> None:
    """Rows that are not aligned, not contiguous, or more than two-dimensional."""
    weight = random_weight(4, 96, 40, 32)
    served = prepared(weight, cuda.KERNEL)
    flat = torch.randn(3 * 4 * 96 + 1, dtype=torch.float16)
    for x in (flat[1:].view(3, 4, 96), flat[:-1].view(96, 12).t(), flat[:-1].view(12, 96)[::2]):
        assert error(served.multiply(x), exact(weight, x, None)) < 5e-4


@pytest.mark.parametrize("act_order", [False, True])
def test_the_dense_weight_is_that_of_the_layer(act_order: bool, driver: Emulator) -> None:
    weight = random_weight(3, 100, 40, 32, act_order=act_order)
    served = prepared(weight, cuda.KERNEL)
    _, spec, tensors, _ = served
    layout = [tensors.get(name) for name in ("qweight", "scales", "zeros", "perm")]
    dense = cuda.dequantize(*layout, spec.in_features, spec.out_features, spec.bits, torch.float32)
    assert torch.equal(dense.t(), weight.dequantize(torch.float32))


def test_wrong_inputs_are_refused(driver: Emulator) -> None:
    served = prepared(random_weight(4, 96, 40, 32), cuda.KERNEL)
    for x in (torch.ones(3, 95), torch.ones(3, 96, dtype=torch.int32), torch.ones(3, 96, device="meta")):
        with pytest.raises(ValueError, match="expected floating point with a last dimension of 96 on cpu"):
            served.multiply(x)
    for bias in (torch.ones(39), torch.ones(40, device="meta")):
        with pytest.raises(ValueError, match="bias is .* expected \\(40,\\) on cpu"):
            served.multiply(torch.ones(3, 96), bias)


def test_a_plan_without_a_kernel_is_refused(driver: Emulator) -> None:
    served = prepared(random_weight(4, 96, 40, 32), cuda.KERNEL)
    with pytest.raises(ValueError, match="no kernel with 3 strips"):
        multiply(served, torch.ones(1, 96, dtype=torch.float16), None, Plan(3, 1))


@given(
    rows=st.integers(1, 5000),
    outputs=st.integers(1, 70000),
    tiles=st.integers(1, 500),
    bits=st.sampled_from([2, 3, 4, 8]),
    processors=st.integers(1, 200),
    device=st.sampled_from([((7, 5), 64), ((8, 0), 163), ((8, 9), 99), ((9, 0), 227), ((10, 0), 227), ((12, 0), 99)]),
)
def test_every_plan_has_a_kernel_that_fits_and_gives_each_block_work(
    rows, outputs, tiles, bits, processors, device
) -> None:
    capability, shared = device
    plan = cuda_plan.plan(rows, outputs, tiles, bits, Gpu(processors, shared << 10, capability))
    if plan is None:
        assert rows > 16
        return
    assert cuda_plan.fits(plan, tiles, bits, shared << 10)
    assert (plan.strips, plan.tokens) in {(1, 1), (1, 2), (2, 1), (2, 2), (0, 2), (0, 4), (0, 8)}
    assert 1 <= plan.splits <= max(1, tiles // 4)
    assert plan.warps * plan.strips * plan.tokens * 512 <= 48 * 1024
    assert plan.warps <= 8 or (plan.strips, plan.tokens) == (1, 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_plans_know_the_shared_memory_of_a_launch(bits: int, driver: Emulator) -> None:
    served = prepared(random_weight(bits, 300, 40, 64), cuda.KERNEL)
    for tokens in (2, 4, 8):
        multiply(served, torch.ones(3, 300, dtype=torch.float16), None, Plan(0, tokens))
        assert driver.shared_bytes == cuda_plan._wide_bytes(bits, tokens, 227 << 10)


def _busiest(how: Plan, out_features: int, processors: int) -> float:
    """Strips of the multiprocessor that has the most, against a fair share."""
    strips = math.ceil(out_features / 16)
    return math.ceil(math.ceil(strips / how.strips) / processors) * how.strips / (strips / processors)


@pytest.mark.parametrize(("processors", "capability"), [(108, (8, 0)), (132, (9, 0)), (142, (8, 9)), (128, (8, 9))])
@pytest.mark.parametrize("rows", [1, 16])
def test_no_multiprocessor_has_much_more_strips_than_others(
    rows: int, processors: int, capability: tuple[int, int]
) -> None:
    for out_features in (4096, 6144, 8192, 11008, 14336):
        how = cuda_plan.plan(rows, out_features, 64, 4, Gpu(processors, 99 << 10, capability))
        assert _busiest(how, out_features, processors) < 1.3
