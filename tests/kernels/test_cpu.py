"""The C++ kernels: exact to the stated error in every format, shape and instruction set, and safe to call."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptq_backend import Kernel, QuantizedWeight, QuantLinear
from gptq_backend.format import encode
from gptq_backend.kernels import cpu
from gptq_backend.kernels import table as kernels
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import LIMITS, ROOT, assert_passes_at, error, exact, native, prepared

NAMES = "gradient", "block", "block_calls", "layers", "layer_halves", "experts", "dense", "router"
SANITIZED = [str(Path(__file__).with_name(f"test_cpu_{name}.py")) for name in NAMES]
FORCED = os.environ.get("GPTQ_BACKEND_CPU_LEVEL")


@native
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    columns=st.integers(1, 300),
    outputs=st.integers(1, 70),
    size=st.sampled_from([1, 8, 24, 32, 48, 128, 200, 300]),
    rows=st.sampled_from([1, 2, 3, 4, 5, 6, 7, 11, 23, 49, 97]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    scales_dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    sym=st.booleans(),
    act_order=st.booleans(),
    with_bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_any_shape_any_format(
    bits, columns, outputs, size, rows, dtype, scales_dtype, sym, act_order, with_bias, seed
) -> None:
    torch.manual_seed(seed)
    weight = random_weight(bits, columns, outputs, min(size, columns), sym=sym, act_order=act_order)
    weight = QuantizedWeight(weight.codes, weight.scales.to(scales_dtype), weight.zeros, weight.g_idx, bits)
    x = (torch.randn(rows, columns) * torch.randn(columns).exp()).to(dtype)
    bias = torch.randn(outputs).to(dtype) if with_bias else None
    served = prepared(weight, cpu.KERNEL)
    # A result of few elements may be rounded worse than the average: compare it with its own exact value, rounded.
    expected = exact(weight, x, bias)
    slack = error(expected.to(dtype), expected)
    assert error(served.multiply(x, bias), expected) < max(LIMITS[dtype], 1.5 * slack)


@native
@pytest.mark.skipif(FORCED is not None, reason="this is the run that such a test starts")
@pytest.mark.parametrize("level", cpu._cpu.levels()[:-1] if cpu._cpu else [])
def test_lower_instruction_sets_are_as_exact(level: str) -> None:
    test = "test_any_shape_any_format or test_int8 or test_not_finite"
    assert_passes_at(level, __file__, "-k", test)


@native
def test_a_level_that_the_machine_lacks_is_refused_by_name() -> None:
    code = "from gptq_backend.kernels.cpu import _cpu; _cpu.level()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"GPTQ_BACKEND_CPU_LEVEL": "altivec"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode != 0
    assert "GPTQ_BACKEND_CPU_LEVEL=altivec: this CPU offers generic" in done.stderr


@native
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("rows", [1, 3, 40])
def test_int8_activations_cost_one_percent(bits: int, rows: int) -> None:
    """8-bit rounding of Gaussian activations in blocks of 128: step/sqrt(12) for a peak of about 2.8 sigma."""
    weight = random_weight(bits, 512, 96, 128, act_order=True)
    x, bias = torch.randn(rows, 512), torch.randn(96)
    served = prepared(weight, cpu.W4A8)
    found = error(served.multiply(x, bias), exact(weight, x, bias))
    assert 1e-4 < found < 1.5e-2


@native
def test_int8_activations_are_never_chosen_by_themselves() -> None:
    spec, _ = encode(random_weight(4, 64, 32, 32))
    assert kernels.select_kernel(spec, torch.device("cpu")).name == "cpu"
    assert kernels.select_kernel(spec, torch.device("cpu"), "cpu_w4a8").name == "cpu_w4a8"


@native
@pytest.mark.parametrize("kernel", [cpu.KERNEL, cpu.W4A8], ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("bad", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("rows", [2, 9])
def test_not_finite_activations_spoil_their_own_row_only(kernel: Kernel, bad: float, rows: int) -> None:
    weight = random_weight(4, 256, 40, 64)
    served = prepared(weight, cpu.KERNEL)
    x = torch.randn(rows, 256, dtype=torch.bfloat16)
    clean = served.multiply(x)
    x[1, 77] = bad
    y = served.multiply(x)
    assert y[1].isnan().all()
    assert torch.equal(y[0], clean[0])
    assert torch.equal(y[2:], clean[2:])


@native
def test_extreme_magnitudes_keep_their_relative_error() -> None:
    weight = random_weight(4, 256, 40, 64)
    served = prepared(weight, cpu.KERNEL)
    for scale in (1e-30, 1e-5, 1e20, 1e30):
        x = torch.randn(3, 256) * scale
        assert error(served.multiply(x), exact(weight, x, None)) < 1e-6
    assert (served.multiply(torch.zeros(3, 256), None) == 0).all()


@native
def test_one_outlier_does_not_drown_the_other_blocks() -> None:
    """Scales are per token and block: the int16 step next to an outlier of 1e4 is coarse, elsewhere it is fine."""
    weight = random_weight(4, 512, 64, 128)
    served = prepared(weight, cpu.KERNEL)
    x = torch.randn(4, 512)
    x[:, 5] = 1e4
    expected = exact(weight, x, None) - exact(weight, x * (torch.arange(512) < 128), None)
    y = served.multiply(x * (torch.arange(512) >= 128), None)
    assert error(y, expected) < 1e-6


@native
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_an_outlier_costs_bits_only_where_its_weight_is_zero(dtype: torch.dtype) -> None:
    weight = random_weight(4, 1024, 512, 128)
    x = (torch.randn(4, 1024) * 0.1).to(dtype)
    x[:, 7] = 1000
    expected = exact(weight, x, None)
    served = prepared(weight, cpu.KERNEL)
    y = served.multiply(x)
    blind = weight.dequantize()[:, 7] == 0
    assert 0 < blind.sum() < 512
    assert error(y[:, blind], expected[:, blind]) < 0.05
    assert error(y[:, ~blind], expected[:, ~blind]) < LIMITS[dtype]


@native
@pytest.mark.parametrize("x_dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("bias_dtype", [None, torch.float32, torch.float64])
def test_the_operator_in_cpp_is_the_one_in_python(x_dtype: torch.dtype, bias_dtype: torch.dtype | None) -> None:
    _, _, t, _ = prepared(random_weight(4, 90, 33, 30, act_order=True, sym=False), cpu.KERNEL)
    layout = (t["qweight"], t["scales"], t["zeros"], t["perm"], t["blocks"], 90, 33, 4, False)
    flat = torch.randn(12 * 90 + 1, dtype=torch.float64).to(x_dtype)
    bias = None if bias_dtype is None else torch.randn(66, dtype=bias_dtype)[::2]
    for x in (
        flat[:90],
        flat[:-1].view(3, 4, 90),
        flat[1:].view(12, 90)[::2],
        flat[:-1].view(90, 12).t(),
        flat[:0].view(0, 90),
        flat[:0].view(2, 0, 90),
    ):
        expected = cpu.gemm(x, *layout, bias)
        y = torch.ops.gptq_backend.cpu_gemm_inference(x, *layout, bias)
        assert torch.equal(y, expected)
        assert (y.dtype, y.stride()) == (expected.dtype, expected.stride())
        if bias is not None:
            assert torch.equal(
                torch.ops.gptq_backend.cpu_gemm_inference(x, *layout, bias.contiguous()),
                expected,
            )


@native
@pytest.mark.skipif(not cpu._FUNCTIONS, reason="this torch has no stable interface for operators in C++")
def test_a_wrong_input_of_the_operator_in_cpp_is_an_error() -> None:
    _, _, t, _ = prepared(random_weight(4, 64, 32, 32), cpu.KERNEL)
    layout = (t["qweight"], t["scales"], None, None, t["blocks"], 64, 32, 4, False)
    for x in (torch.ones(3, 63), torch.ones(3, 64, dtype=torch.int32), torch.tensor(1.0)):
        with pytest.raises(RuntimeError, match="cpu_gemm with the same arguments says why"):
            torch.ops.gptq_backend.cpu_gemm_inference(x, *layout, None)
    with pytest.raises(RuntimeError, match="cpu_gemm with the same arguments says why"):
        torch.ops.gptq_backend.cpu_gemm_inference(torch.ones(3, 64), *layout, torch.ones(31))


@native
def test_an_older_torch_keeps_the_operator_in_python(monkeypatch: pytest.MonkeyPatch) -> None:
    class Extension:
        @staticmethod
        def torch_functions() -> list[str]:
            return ["aoti_torch_get_dim", "no_such_function"]

    monkeypatch.setattr(cpu, "_cpu", Extension)
    assert cpu._torch_functions() == {}


@native
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_gradients_are_those_of_the_dense_layer(bits: int, act_order: bool) -> None:
    weight = random_weight(bits, 90, 33, 30, act_order=act_order)
    layer = QuantLinear.from_weight(weight, torch.randn(33), backend="cpu")
    assert layer.bias is not None
    layer.bias.requires_grad_()
    x, grad = torch.randn(5, 90, requires_grad=True), torch.randn(5, 33)
    layer(x).backward(grad)
    assert x.grad is not None
    assert layer.bias.grad is not None
    assert error(x.grad, grad.double() @ weight.dequantize(torch.float64)) < LIMITS[torch.float32]
    torch.testing.assert_close(layer.bias.grad, grad.sum(0))


@native
def test_compiles_without_a_graph_break() -> None:
    layer = QuantLinear.from_weight(random_weight(4, 64, 32, 32, act_order=True), torch.randn(32), backend="cpu")
    x = torch.randn(3, 64)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert torch.equal(compiled(x), layer(x))


@native
@pytest.mark.parametrize("shape", [(0, 64), (64,), (2, 0, 64), (2, 3, 64)])
def test_shapes_of_x(shape: tuple[int, ...]) -> None:
    weight = random_weight(4, 64, 32, 32)
    served = prepared(weight, cpu.KERNEL)
    x = torch.randn(shape)
    y = served.multiply(x)
    assert y.shape == (*shape[:-1], 32)
    torch.testing.assert_close(y, x @ weight.dequantize().t())


@native
def test_x_that_is_a_view() -> None:
    weight = random_weight(4, 64, 32, 32)
    served = prepared(weight, cpu.KERNEL)
    x = torch.randn(64, 5).t()
    torch.testing.assert_close(served.multiply(x), x @ weight.dequantize().t())


@native
def test_bias_that_is_a_view() -> None:
    weight, bias = random_weight(4, 64, 32, 32), torch.randn(64)[::2]
    served = prepared(weight, cpu.KERNEL)
    x = torch.randn(3, 64)
    torch.testing.assert_close(served.multiply(x, bias), x @ weight.dequantize().t() + bias)


@native
@pytest.mark.parametrize(
    "x",
    [torch.randn(2, 63), torch.ones(2, 64, dtype=torch.int64), torch.empty(2, 64, device="meta"), torch.tensor(1.0)],
)
def test_x_that_cannot_be_read_is_refused(x: Tensor) -> None:
    served = prepared(random_weight(4, 64, 32, 32), cpu.KERNEL)
    with pytest.raises(ValueError, match="expected floating point with a last dimension of 64 on cpu"):
        served.multiply(x)


@native
@pytest.mark.skipif(sys.platform != "linux", reason="Linux's /proc counts the threads")
def test_threads_follow_torch_and_do_not_change_the_result() -> None:
    """One thread starts no pool; two give bit for bit the same."""
    code = """
import os, torch
torch.set_num_threads(1)
from gptq_backend.kernels import cpu
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import prepared
threads = lambda: len(os.listdir("/proc/self/task"))
served = prepared(random_weight(4, 512, 512, 128), cpu.KERNEL)
x = torch.randn(64, 512)
before = threads()
one = served.multiply(x)
assert threads() == before
torch.set_num_threads(2)
two = served.multiply(x)
assert threads() == before + 1
assert torch.equal(one, two)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_installs_without_a_compiler_and_says_what_is_lost(tmp_path: Path) -> None:
    def build(*options: str, **variables: str) -> subprocess.CompletedProcess[str]:
        command = ["setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")]
        environment = {key: value for key, value in os.environ.items() if key != "GPTQ_BACKEND_REQUIRE_NATIVE"}
        environment |= {"CC": "no-such-compiler", "CXX": "no-such-compiler"} | variables
        return subprocess.run(
            [sys.executable, *command, *options], env=environment, capture_output=True, text=True, cwd=ROOT
        )

    pytest.importorskip("pybind11", reason="the build imports it; it is part of the test extra")
    for options in ([], ["--inplace"]):  # as `pip install .` and `pip install -e .` do
        done = build(*options)
        assert done.returncode == 0, done.stderr
        assert "only its slow plain-torch kernel serves. Install" in done.stderr
        if sys.platform == "linux":
            assert "on NVIDIA GPUs Triton serves. Install" in done.stderr
        assert "pip install --no-cache-dir --force-reinstall --no-deps gptq-backend" in done.stderr
    assert build(GPTQ_BACKEND_REQUIRE_NATIVE="1").returncode != 0


@pytest.mark.slow
@native
@pytest.mark.timeout(1800)  # compiling every level with sanitizers takes minutes
def test_address_and_undefined_behaviour_sanitizers_find_nothing(tmp_path: Path) -> None:
    pytest.importorskip("pybind11")
    subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")],
        env=os.environ
        | {"GPTQ_BACKEND_SANITIZE": "address,undefined", "GPTQ_BACKEND_REQUIRE_NATIVE": "1", "GPTQ_BACKEND_CUDA": "0"},
        check=True,
        capture_output=True,
        cwd=ROOT,
    )
    runtime = [
        subprocess.run(["g++", f"-print-file-name=lib{name}.so"], capture_output=True, text=True).stdout.strip()
        for name in ("asan", "ubsan")
    ]
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r} + "/gptq_backend")
import torch, _cpu
sys.modules["gptq_backend._cpu"] = _cpu
import pytest
files = [{__file__!r}, *{SANITIZED!r}]
tests = "any_shape or every_code or int8_act or undone or not_finite or operator_in_cpp or exact or nan or refused"
tests += " or empty or one_call or ending or last_sum or not_contiguous or at_once or key"
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", *files, "-k", f"({{tests}}) and not lower"]))
"""
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"LD_PRELOAD": " ".join(runtime), "ASAN_OPTIONS": "detect_leaks=0"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "passed" in done.stdout


def test_a_missing_extension_says_how_to_get_it_past_pips_cache() -> None:
    code = (
        "import sys; sys.modules['gptq_backend._cpu'] = sys.modules['gptq_backend._cuda'] = None; "
        "from gptq_backend.kernels import cpu; from gptq_backend.kernels.cuda import loading; "
        "print(cpu._MISSING, loading.MISSING)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.count("--no-cache-dir --force-reinstall --no-deps") == (2 if sys.platform == "linux" else 1)
