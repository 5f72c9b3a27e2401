"""The CUDA kernels on a GPU: `make test-gpu`. What the host can check is in tests/kernels/test_cuda.py."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gptq_backend import Kernel, QuantizedWeight, QuantLinear
from gptq_backend.format.weight import LinearSpec
from gptq_backend.kernels import table as kernels
from gptq_backend.kernels.cuda import operators as cuda
from tests.format.test_weight import random_weight
from tests.kernels.test_cpu import LIMITS, error, exact, prepared

pytestmark = pytest.mark.gpu

ROWS = (1, 2, 7, 8, 9, 16, 17, 31, 32, 33, 64, 65, 128, 129, 300)
# (K, N, group size): usual ones, and odd ones in every direction.
SHAPES = [(4096, 1024, 128), (1024, 4100, 32), (11008, 256, -1), (1000, 70, 48), (331, 33, 64), (64, 16, 64)]


def layer(
    bits: int, columns: int, outputs: int, size: int, kernel: Kernel = kernels.CUDA, **how: bool
) -> tuple[QuantizedWeight, LinearSpec, dict[str, Tensor]]:
    """The weight on the CPU, and its tensors prepared on the GPU."""
    weight = random_weight(bits, columns, outputs, columns if size == -1 else min(size, columns), **how)
    spec, tensors = prepared(weight, kernels.REFERENCE)
    if reason := kernel.supports(spec, torch.device("cuda", 0)):
        pytest.skip(reason)
    return weight, spec, kernel.prepare(spec, {name: tensor.cuda() for name, tensor in tensors.items()})


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
        weight, spec, tensors = layer(bits, columns, outputs, size, sym=sym, act_order=act_order)
        dense = weight.dequantize(torch.float64).t().cuda()
        for rows in ROWS:
            x = torch.randn(rows, columns, device="cuda").to(dtype)
            bias = torch.randn(outputs, device="cuda").to(dtype) if rows % 2 else None
            expected = x.double() @ dense + (0 if bias is None else bias.double())
            slack = error(expected.to(dtype), expected)
            y = kernels.CUDA.apply(spec, tensors, x, bias)
            # Through the dense weight (many rows, float32), that weight is rounded too. 1e-5: cuBLAS sums in float32,
            # one after another; TF32 would be at 3e-4.
            limit = 1e-5 if dtype == torch.float32 else LIMITS[dtype]
            assert error(y, expected) < max(limit, 3 * slack), (columns, outputs, size, rows)


def test_every_plan_is_right_and_repeats_bit_for_bit() -> None:
    plans = [cuda.Plan(s, t, w) for (s, t), w in itertools.product(((1, 1), (2, 1), (2, 2)), (1, 4, 8))]
    plans += [cuda.Plan(1, 1, 16)]  # of the others, 16 warps want more registers than there are
    plans += [cuda.Plan(0, t, splits=s) for t, s in itertools.product((2, 4, 8), (1, 2, 5, 16))]
    for bits in (2, 3, 4, 8):
        weight, spec, tensors = layer(bits, 2048, 520, 64, sym=False)
        x = torch.randn(70, 2048, dtype=torch.float16)
        expected = exact(weight, x, None)
        with pytest.MonkeyPatch.context() as patch:
            for plan in plans:
                patch.setattr(cuda, "plan", lambda *_, plan=plan: plan)
                y = kernels.CUDA.apply(spec, tensors, x.cuda(), None)
                assert error(y.cpu(), expected) < 5e-4, plan
                for _ in range(3):
                    assert torch.equal(kernels.CUDA.apply(spec, tensors, x.cuda(), None), y), plan


@pytest.mark.parametrize("act_order", [False, True])
def test_unprepare_gives_the_checkpoint_back(act_order: bool) -> None:
    for bits, (columns, outputs, size) in itertools.product((2, 3, 4, 8), SHAPES):
        weight = random_weight(bits, columns, outputs, columns if size == -1 else size, act_order=act_order)
        spec, tensors = prepared(weight, kernels.REFERENCE)
        back = cuda.unprepare(spec, cuda.prepare(spec, {name: tensor.cuda() for name, tensor in tensors.items()}))
        assert all(torch.equal(back[name].cpu(), tensors[name]) for name in back)


def test_another_stream_and_two_at_once() -> None:
    """Results do not depend on the stream, and layers in flight on two of them share nothing."""
    _, spec, tensors = layer(4, 4096, 4096, 128, act_order=True)
    inputs = [torch.randn(rows, 4096, dtype=torch.float16).cuda() for rows in (1, 16, 100)]
    expected = [kernels.CUDA.apply(spec, tensors, x, None) for x in inputs]
    torch.cuda.synchronize()
    streams, results = [torch.cuda.Stream(), torch.cuda.Stream()], []
    for _ in range(20):
        for stream in streams:
            with torch.cuda.stream(stream):
                results.append([kernels.CUDA.apply(spec, tensors, x, None) for x in inputs])
    torch.cuda.synchronize()
    for result in results:
        assert all(torch.equal(*pair) for pair in zip(result, expected))


@pytest.mark.parametrize("rows", [1, 16, 100, 600])
def test_graphs_capture_and_replay(rows: int) -> None:
    _, spec, tensors = layer(4, 1024, 2048, 128, act_order=True)
    x = torch.randn(rows, 1024, dtype=torch.float16).cuda()
    kernels.CUDA.apply(spec, tensors, x, None)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = kernels.CUDA.apply(spec, tensors, x, None)
    for _ in range(3):
        x.copy_(torch.randn_like(x))
        y.fill_(float("nan"))
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(y, kernels.CUDA.apply(spec, tensors, x, None))


@pytest.mark.parametrize("rows", [1, 40, 600])
def test_compiled_without_a_graph_break(rows: int) -> None:
    weight = random_weight(4, 512, 256, 128, act_order=True)
    linear = QuantLinear.from_weight(weight, torch.randn(256), backend="cuda").cuda()
    x = torch.randn(rows, 512, dtype=torch.float16, device="cuda")
    compiled = torch.compile(linear, fullgraph=True)
    assert torch.equal(compiled(x), linear(x))


def test_gradients_and_fake_tensors() -> None:
    tensors = layer(4, 128, 96, 32, act_order=True)[2]
    x = torch.randn(3, 128, device="cuda", dtype=torch.float16, requires_grad=True)
    arguments = (
        x, tensors["qweight"], tensors["scales"], tensors.get("zeros"), tensors.get("perm"), 128, 96, 4,
        torch.randn(96, device="cuda", requires_grad=True),
    )  # fmt: skip
    torch.library.opcheck(torch.ops.gptq_backend.cuda_gemm.default, arguments)
    for act_order in (False, True):
        tensors = layer(4, 128, 96, 32, act_order=act_order)[2]
        names = ("qweight", "scales", "zeros", "perm")
        arguments = (*(tensors.get(name) for name in names), 128, 96, 4, torch.float16)
        torch.library.opcheck(torch.ops.gptq_backend.cuda_dequantize.default, arguments)


def test_a_second_device_is_switched_to_and_back() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("one GPU")
    weight = random_weight(4, 256, 128, 64)
    linear = QuantLinear.from_weight(weight, None, backend="cuda").to("cuda:1")
    x = torch.randn(2, 256, dtype=torch.float16, device="cuda:1")
    assert error(linear(x).cpu(), exact(weight, x.cpu(), None)) < 5e-4
    assert torch.cuda.current_device() == 0


def test_tiny() -> None:
    """What `make test-gpu` also runs under compute-sanitizer: every kernel once, with tails in every direction."""
    for bits in (2, 3, 4, 8):
        weight, spec, tensors = layer(bits, 100, 40, 32, act_order=True)
        x = torch.randn(9, 100, dtype=torch.float16)
        with pytest.MonkeyPatch.context() as patch:
            for plan in (
                cuda.Plan(1, 1),
                cuda.Plan(2, 1),
                cuda.Plan(2, 2),
                cuda.Plan(0, 2),
                cuda.Plan(0, 8, splits=2),
                None,
            ):
                patch.setattr(cuda, "plan", lambda *_, plan=plan: plan)
                y = kernels.CUDA.apply(spec, tensors, x.cuda(), None)
                assert error(y.cpu(), exact(weight, x, None)) < 1e-3, plan


def test_models_choose_this_row() -> None:
    spec, _ = prepared(random_weight(4, 256, 128, 64), kernels.REFERENCE)
    reasons = kernels.kernel_report(spec, torch.device("cuda", 0))
    assert kernels.select_kernel(spec, torch.device("cuda", 0)) is kernels.CUDA, reasons
