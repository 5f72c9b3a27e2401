"""Products grouped by expert: every row meets its own expert, wherever the router sends it."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from gptq_backend import Kernel, QuantizedWeight
from gptq_backend.kernels import ExpertKernel, PreparedWeight, Routing, cpu, reference, self_check
from gptq_backend.kernels import experts as moe
from gptq_backend.kernels import table as kernels
from gptq_backend.kernels.expert_routing import sort_by_expert
from gptq_backend.kernels.triton import operators as triton_ops
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import LIMITS, error, exact, native, prepared

CPU = torch.device("cpu")
IDS = [
    torch.tensor([[0, 2], [2, 1], [-1, 2], [1, 0], [3, 3]]),  # experts of another rank come out as zeros
    torch.full((20, 1), 1),  # one has all of them
    torch.tensor([[2]]),
]


def row_of(kernel: Kernel) -> ExpertKernel:
    row = kernels.expert_kernel(kernel)
    assert row is not None
    return row


def stacked(kernel: Kernel, weights: Sequence[QuantizedWeight]) -> tuple[list[PreparedWeight], dict[str, Tensor]]:
    """Each prepared, and the stack."""
    each = [prepared(weight, kernel) for weight in weights]
    biases = [None] * len(each)
    assert moe.why_not_groupable(each, biases) is None
    return each, {name: parameter.data for name, parameter in moe.Grouped(each, biases).named_parameters()}


def check_experts(
    kernel: Kernel, bits: int, act_order: bool, dtype: torch.dtype, ids: Tensor, parts: int = 1, device=CPU
) -> None:
    """Against a plain loop in float64. ids: [T, k]."""
    weights = [random_weight(bits, 90, 40, 32, seed, act_order=act_order) for seed in range(3 * parts)]
    each, stack = stacked(kernel, weights)
    top_k = ids.shape[1]
    x, bias = torch.randn(len(ids), 90).to(dtype), torch.randn(3 * parts, 40).to(dtype)
    stack = {name: tensor.to(device) for name, tensor in stack.items()}
    routing = Routing(ids.to(device), 3)
    y = row_of(kernel).gemm(x.to(device), arguments(each, stack), routing, top_k, bias.to(device)).cpu()
    expected = torch.zeros(ids.numel(), parts, 40, dtype=torch.float64)
    for row, expert in enumerate(ids.flatten().tolist()):
        for part in range(parts if 0 <= expert < 3 else 0):
            number = part * 3 + expert
            expected[row, part] = exact(weights[number], x[row // top_k], bias[number])
    assert y.dtype == dtype
    assert error(y, expected.flatten(1)) < LIMITS[dtype]


def arguments(each: Sequence[PreparedWeight], stack: dict[str, Tensor]) -> tuple[Any, ...]:
    return each[0].kernel.layout.arguments(each[0].spec, stack)


def check_opcheck(kernel: Kernel, operator: Any, *more: Any) -> None:
    """more: what comes between the layout and top_k."""
    each, stack = stacked(kernel, [random_weight(4, 64, 20, 32, seed) for seed in range(4)])
    torch.library.opcheck(operator, (torch.randn(2, 64), *arguments(each, stack), *more, torch.randn(4, 20)))


# -- where rows go -----------------------------------------------------------------------------------------------------


@given(rows=st.integers(0, 70), experts=st.integers(1, 9), block=st.sampled_from([1, 2, 16]), seed=st.integers(0, 9))
def test_sorted_rows_are_all_there_once_in_blocks_of_one_expert(rows: int, experts: int, block: int, seed: int) -> None:
    ids = torch.randint(-1, experts + 2, (rows,), generator=torch.Generator().manual_seed(seed))
    order, of_block = sort_by_expert(ids, experts, block)
    assert len(order) == len(of_block) * block
    real = order < rows
    assert torch.equal(order[real].sort().values, torch.arange(rows, dtype=torch.int32))
    known = torch.where((ids < 0) | (ids >= experts), -1, ids)
    assert torch.equal(known[order[real].long()].int(), of_block.repeat_interleave(block)[real])


@given(rows=st.integers(0, 40), parts=st.integers(1, 3), seed=st.integers(0, 9))
def test_blocks_of_several_projections_are_those_of_more_experts(rows: int, parts: int, seed: int) -> None:
    ids = torch.randint(-1, 6, (rows,), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    order, of_block = Routing(ids, 5).blocks(4, parts)
    found = torch.full((rows * parts,), -2, dtype=torch.int32)
    real = order < rows * parts
    assert int(real.sum()) == rows * parts
    found[order[real].long()] = of_block.repeat_interleave(4)[real]
    known = torch.where((ids < 0) | (ids >= 5), -1, ids)
    for part in range(parts):
        assert torch.equal(found[part::parts], torch.where(known < 0, -1, known + part * 5))


@given(rows=st.integers(0, 40), seed=st.integers(0, 9), dtype=st.sampled_from([torch.uint8, torch.int32, torch.int64]))
def test_runs_hold_each_experts_rows_in_their_order(rows: int, seed: int, dtype: torch.dtype) -> None:
    ids = torch.randint(0, 7, (rows,), generator=torch.Generator().manual_seed(seed)).to(dtype)
    runs = Routing(ids, 5).runs()
    assert [expert for expert, _ in runs] == sorted({int(i) for i in ids if i < 5})
    for expert, where in runs:
        assert torch.equal(where, (ids == expert).nonzero()[:, 0])


# -- on a CPU ----------------------------------------------------------------------------------------------------------


@native
@pytest.mark.parametrize("ids", IDS, ids=lambda ids: str(tuple(ids.shape)))
@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_experts_on_a_cpu(bits: int, act_order: bool, ids: Tensor) -> None:
    check_experts(cpu.KERNEL, bits, act_order, torch.float32, ids, parts=2)


@native
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    experts=st.integers(1, 5),
    # 480 is where activations no longer become integers all at once, 48 a task's rows, 4 the most for the vector path.
    tokens=st.sampled_from([0, 1, 2, 4, 5, 7, 30, 49, 300, 481, 1000]),
    top_k=st.integers(1, 3),
    parts=st.integers(1, 2),
    spread=st.sampled_from(["even", "one", "none", "some elsewhere"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    id_dtype=st.sampled_from([torch.int32, torch.int64]),
    sym=st.booleans(),
    act_order=st.booleans(),
    with_bias=st.booleans(),
    threads=st.integers(1, 3),
    a8=st.booleans(),
    seed=st.integers(0, 99),
)
def test_one_call_gives_the_bits_of_one_call_per_expert(
    bits, experts, tokens, top_k, parts, spread, dtype, id_dtype, sym, act_order, with_bias, threads, a8, seed
) -> None:
    torch.manual_seed(seed)
    kernel: Any = cpu.W4A8 if a8 else cpu.KERNEL
    weights = [random_weight(bits, 50, 20, 24, seed + i, sym=sym, act_order=act_order) for i in range(experts * parts)]
    each, stack = stacked(kernel, weights)
    low, high = {"even": (0, experts), "one": (0, 1), "none": (-1, 0), "some elsewhere": (-2, experts + 2)}[spread]
    ids = torch.randint(low, high, (tokens, top_k)).to(id_dtype)
    x, bias = torch.randn(tokens, 50).to(dtype), torch.randn(experts * parts, 20) if with_bias else None
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        y = row_of(kernel).gemm(x, arguments(each, stack), Routing(ids, experts), top_k, bias).view(-1, parts, 20)
        for part in range(parts):
            first = part * experts
            alone = [
                lambda x, i=i: each[i].multiply(x, None if bias is None else bias[i])
                for i in range(first, first + experts)
            ]
            assert torch.equal(y[:, part], moe.one_by_one(alone, 20, x, Routing(ids, experts), top_k))
    finally:
        torch.set_num_threads(before)


@native
def test_the_cpu_operator_passes_opcheck() -> None:
    check_opcheck(cpu.KERNEL, torch.ops.gptq_backend.cpu_moe_gemm.default, torch.tensor([0, 1, 1, 0]), 2, 2)


@native
def test_what_the_kernel_would_read_beyond_is_refused() -> None:
    each, stack = stacked(cpu.KERNEL, [random_weight(4, 64, 20, 32, seed) for seed in range(2)])
    ids = torch.tensor([[0, 1], [1, 0]])
    x, bias = torch.randn(2, 64), torch.randn(2, 20)
    multiply = torch.ops.gptq_backend.cpu_moe_gemm
    layout = cpu.KERNEL.layout.arguments(each[0].spec, stack)
    assert multiply(x, *layout, ids, 2, 2, bias).shape == (4, 20)
    for bad in (x.double(), x[:1], x[:, :63], x.long()):
        with pytest.raises(ValueError, match="expected"):
            multiply(bad, *layout, ids, 2, 2, bias)
    for bad_ids in (ids.short(), ids[:1], ids.float()):
        with pytest.raises(ValueError, match="expected 16 bits or float32 .* and int32 or int64"):
            multiply(x, *layout, bad_ids, 2, 2, bias)
    for bad_bias in (bias[:1], bias[0], bias[:, :19]):
        with pytest.raises(ValueError, match=r"expected \(2, 20\)"):
            multiply(x, *layout, ids, 2, 2, bad_bias)


# -- graphs ------------------------------------------------------------------------------------------------------------


@native
def test_a_graph_breaks_at_the_experts_or_holds_a_number_of_rows() -> None:
    each, stack = stacked(cpu.KERNEL, [random_weight(4, 64, 20, 32, seed) for seed in range(3)])

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def compiled(x: Tensor, ids: Tensor) -> Tensor:
        return row_of(cpu.KERNEL).op(x, arguments(each, stack), Routing(ids, 3), 2, None)

    for ids in (IDS[0], IDS[0][:2]):
        x = torch.randn(len(ids), 64)
        expected = row_of(cpu.KERNEL).gemm(x, arguments(each, stack), Routing(ids, 3), 2, None)
        assert torch.equal(compiled(x, ids), expected)


@pytest.mark.parametrize("kernel", [cpu.KERNEL, triton_ops.KERNEL], ids=lambda kernel: kernel.name)
def test_the_host_waits_for_no_value(kernel: Kernel) -> None:
    """What a CUDA graph demands. Tensors without values raise an error when one is asked for."""
    each, stack = stacked(triton_ops.KERNEL, [random_weight(4, 64, 20, 32, seed) for seed in range(6)])
    if kernel is cpu.KERNEL:
        stack = {**stack, "blocks": torch.zeros(3, 4, 3, dtype=torch.int32)}
    with FakeTensorMode() as mode:
        fake = {name: mode.from_tensor(tensor) for name, tensor in stack.items()}
        ids, x = torch.empty(5, 2, dtype=torch.int64), torch.empty(5, 64)
        y = row_of(kernel).op(x, arguments(each, fake), Routing(ids, 3), 2, None)
    assert y.shape == (10, 40)


def test_experts_one_by_one_in_a_cuda_graph_look_at_no_value(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = torch.randn(3, 8, 4)
    each = [lambda x, w=w: x @ w for w in weights]
    ids, x = IDS[0], torch.randn(5, 8)
    expected = moe.one_by_one(each, 4, x, Routing(ids, 3), 2)
    assert expected[:2].any()
    assert not expected[4].any()
    monkeypatch.setattr(moe, "_capturing", lambda x: True)
    monkeypatch.setattr(Routing, "runs", None)
    torch.testing.assert_close(moe.one_by_one(each, 4, x, Routing(ids, 3), 2), expected)


# -- what can be grouped -----------------------------------------------------------------------------------------------


def obstacle(weights: Sequence[QuantizedWeight], kernels_: Sequence[Kernel], biases: Sequence[Any] = ()) -> str | None:
    each = [prepared(weight, kernel) for weight, kernel in zip(weights, kernels_)]
    return moe.why_not_groupable(each, biases or [None] * len(weights))


def test_experts_that_differ_are_not_stacked_and_it_is_said_in_what() -> None:
    one, row = random_weight(4, 64, 20, 32), triton_ops.KERNEL
    same = random_weight(4, 64, 20, 32, 1)
    assert obstacle([one, same], [row, row]) is None
    assert "bits: 4 and 8" in str(obstacle([one, random_weight(8, 64, 20, 32)], [row, row]))
    assert "out_features: 20 and 24" in str(obstacle([one, random_weight(4, 64, 24, 32)], [row, row]))
    assert "zeros" in str(obstacle([one, random_weight(4, 64, 20, 32, sym=True)], [row, row]))
    assert "order" in str(obstacle([one, random_weight(4, 64, 20, 32, act_order=True)], [row, row]))
    assert "biases" in str(obstacle([one, same], [row, row], [None, torch.zeros(20)]))
    assert "kernels reference and triton" in str(obstacle([one, same], [row, reference.KERNEL]))
    assert "'reference', which has no grouped product" in str(obstacle([one, same], [reference.KERNEL] * 2))


def test_an_expert_gets_a_row_with_a_grouped_product_where_there_is_one(monkeypatch: pytest.MonkeyPatch) -> None:
    fastest = dataclasses.replace(reference.KERNEL, name="fastest")
    grouped = dataclasses.replace(reference.KERNEL, name="grouped")
    spec = prepared(random_weight(4, 64, 20, 32), reference.KERNEL).spec
    monkeypatch.setenv(self_check.VARIABLE, "0")  # that row would multiply in a layout of another
    monkeypatch.setattr(kernels, "KERNELS", [fastest, grouped, reference.KERNEL])
    monkeypatch.setattr(kernels, "EXPERT_KERNELS", [dataclasses.replace(cpu.EXPERTS, kernel=grouped)])
    assert kernels.select_kernel(spec, CPU).name == "fastest"
    assert kernels.select_kernel(spec, CPU, expert=True).name == "grouped"
    assert kernels.select_kernel(spec, CPU, "fastest", expert=True).name == "fastest"
    monkeypatch.setattr(kernels, "KERNELS", [fastest, reference.KERNEL])
    monkeypatch.setattr(kernels, "EXPERT_KERNELS", [])
    assert kernels.select_kernel(spec, CPU, expert=True).name == "fastest"
