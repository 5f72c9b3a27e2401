"""The CUDA kernels on a GPU: `make test-gpu`. What the host can check is in tests/kernels/test_cuda.py."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gptq_backend import Kernel, QuantizedWeight, QuantLinear
from gptq_backend.kernels import PreparedWeight
from gptq_backend.kernels import table as kernels
from gptq_backend.kernels.cuda import loading
from gptq_backend.kernels.cuda import operators as cuda
from gptq_backend.kernels.cuda.plan import Plan
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import LIMITS, assert_same_packed, error, exact, packed

pytestmark = pytest.mark.gpu

ROWS = (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 128, 129, 300)
# (K, N, group size): usual ones, and odd ones in every direction.
SHAPES = [(4096, 1024, 128), (1024, 4100, 32), (11008, 256, -1), (1000, 70, 48), (331, 33, 64), (64, 16, 64)]


def layer(
    bits: int, columns: int, outputs: int, size: int, kernel: Kernel = cuda.KERNEL, **how: bool
) -> tuple[QuantizedWeight, PreparedWeight]:
    """The weight on the CPU, and prepared on the GPU."""
    weight = random_weight(bits, columns, outputs, columns if size == -1 else min(size, columns), **how)
    given = packed(weight)
    if reason := kernel.supports(given.spec, torch.device("cuda", 0)):
        pytest.skip(reason)
    return weight, PreparedWeight.of(given.to(torch.device("cuda")), kernel)


def multiply(served: PreparedWeight, x: Tensor, plan: Plan | None) -> Tensor:
    fields = cuda.WeightFields(*cuda.KERNEL.layout.arguments(served.spec, served.tensors))
    return cuda.planned_gemm(x, fields, None, plan)


@pytest.fixture(autouse=True)
def _poisoned() -> Iterator[None]:
    """Tensors that nobody has written hold NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("act_order", [False, True])
def test_every_bucket_of_rows(bits: int, dtype: torch.dtype, sym: bool, act_order: bool) -> None:
    for columns, outputs, size in SHAPES:
        weight, served = layer(bits, columns, outputs, size, sym=sym, act_order=act_order)
        dense = weight.dequantize(torch.float64).t().cuda()
        for rows in ROWS:
            x = torch.randn(rows, columns, device="cuda").to(dtype)
            bias = torch.randn(outputs, device="cuda").to(dtype) if rows % 2 else None
            expected = x.double() @ dense + (0 if bias is None else bias.double())
            slack = error(expected.to(dtype), expected)
            y = served.multiply(x, bias)
            # Through the dense weight (many rows, float32), that weight is rounded too. 1e-5: cuBLAS sums in float32,
            # one after another; TF32 would be at 3e-4.
            limit = 1e-5 if dtype == torch.float32 else LIMITS[dtype]
            assert error(y, expected) < max(limit, 3 * slack), (columns, outputs, size, rows)


def test_every_plan_is_right_and_repeats_bit_for_bit() -> None:
    plans = [Plan(s, t, w) for (s, t), w in itertools.product(((1, 1), (2, 1), (2, 2)), (1, 4, 8))]
    plans += [Plan(1, 1, 16)]  # of the others, 16 warps want more registers than there are
    plans += [Plan(0, t, splits=s) for t, s in itertools.product((2, 4, 8), (1, 2, 5, 16))]
    for bits in (2, 3, 4, 8):
        weight, served = layer(bits, 2048, 520, 64, sym=False)
        x = torch.randn(70, 2048, dtype=torch.float16)
        expected = exact(weight, x, None)
        for plan in plans:
            y = multiply(served, x.cuda(), plan)
            assert error(y.cpu(), expected) < 5e-4, plan
            for _ in range(3):
                assert torch.equal(multiply(served, x.cuda(), plan), y), plan


@pytest.mark.parametrize("act_order", [False, True])
def test_unprepare_gives_the_checkpoint_back(act_order: bool) -> None:
    for bits, (columns, outputs, size) in itertools.product((2, 3, 4, 8), SHAPES):
        weight = random_weight(bits, columns, outputs, columns if size == -1 else size, act_order=act_order)
        given = packed(weight)
        on_gpu = given.to(torch.device("cuda"))
        assert_same_packed(PreparedWeight.of(on_gpu, cuda.KERNEL).unprepare().to(torch.device("cpu")), given)


def test_another_stream_and_two_at_once() -> None:
    """Results do not depend on the stream, and layers in flight on two of them share nothing."""
    _, served = layer(4, 4096, 4096, 128, act_order=True)
    inputs = [torch.randn(rows, 4096, dtype=torch.float16).cuda() for rows in (1, 16, 100)]
    expected = [served.multiply(x) for x in inputs]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append([served.multiply(x) for x in inputs])
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(*pair) for pair in zip(result, expected))


@pytest.mark.parametrize("rows", [1, 16, 100, 600])
def test_graphs_capture_and_replay(rows: int) -> None:
    _, served = layer(4, 1024, 2048, 128, act_order=True)
    x = torch.randn(rows, 1024, dtype=torch.float16).cuda()
    served.multiply(x)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = served.multiply(x)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, served.multiply(x))


def test_kernels_may_be_loaded_while_a_graph_is_captured() -> None:
    _, served = layer(4, 1024, 2048, 128)
    x = torch.randn(4, 1024, dtype=torch.float16).cuda()
    expected = served.multiply(x)
    torch.cuda.synchronize()
    loading.extension.open_driver(loading.DRIVER)  # which forgets what it has loaded
    loading.unfit.cache_clear()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = served.multiply(x)
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(y, expected)


def test_a_thread_that_has_no_context_yet() -> None:
    """The driver knows a current context for each thread; torch sets it when it first needs one."""
    _, served = layer(4, 256, 128, 64)
    x = torch.randn(2, 256, dtype=torch.float16).cuda()
    expected, results = served.multiply(x), []
    thread = threading.Thread(target=lambda: results.append(served.multiply(x)))
    thread.start()
    thread.join()
    assert torch.equal(results[0], expected)


@pytest.mark.parametrize("rows", [1, 40, 600])
def test_compiled_without_a_graph_break(rows: int) -> None:
    weight = random_weight(4, 512, 256, 128, act_order=True)
    linear = QuantLinear.from_weight(weight, torch.randn(256), backend="cuda", device=torch.device("cuda", 0)).prepare()
    x = torch.randn(rows, 512, dtype=torch.float16, device="cuda")
    compiled = torch.compile(linear, fullgraph=True)
    assert torch.equal(compiled(x), linear(x))


def test_gradients_and_fake_tensors() -> None:
    for act_order in (False, True):
        _, served = layer(4, 128, 96, 32, act_order=act_order)
        fields = cuda.KERNEL.layout.arguments(served.spec, served.tensors)
        x = torch.randn(3, 128, device="cuda", dtype=torch.float16, requires_grad=True)
        bias = torch.randn(96, device="cuda", requires_grad=True)
        torch.library.opcheck(torch.ops.gptq_backend.cuda_gemm.default, (x, *fields, bias))
        inference = torch.ops.gptq_backend.cuda_gemm_inference.default
        torch.library.opcheck(inference, (x.detach(), *fields, bias.detach()))
        torch.library.opcheck(torch.ops.gptq_backend.cuda_dequantize.default, (*fields, torch.float16))


def test_a_second_device_is_switched_to_and_back() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    weight = random_weight(4, 256, 128, 64)
    linear = QuantLinear.from_weight(weight, None, backend="cuda", device=torch.device("cuda", 1))
    x = torch.randn(2, 256, dtype=torch.float16, device="cuda:1")
    assert error(linear(x).cpu(), exact(weight, x.cpu(), None)) < 5e-4
    assert torch.cuda.current_device() == 0


def test_tiny() -> None:
    """What `make test-gpu` also runs under compute-sanitizer: every kernel once, with tails in every direction."""
    for bits in (2, 3, 4, 8):
        weight, served = layer(bits, 100, 40, 32, act_order=True)
        x = torch.randn(9, 100, dtype=torch.float16)
        for plan in (Plan(1, 1), Plan(2, 1), Plan(2, 2), Plan(0, 2), Plan(0, 8, splits=2), None):
            y = multiply(served, x.cuda(), plan)
            assert error(y.cpu(), exact(weight, x, None)) < 1e-3, plan


def test_models_choose_this_row() -> None:
    spec = packed(random_weight(4, 256, 128, 64)).spec
    reasons = kernels.kernel_report(spec, torch.device("cuda", 0))
    assert kernels.select_kernel(spec, torch.device("cuda", 0)) is cuda.KERNEL, reasons
