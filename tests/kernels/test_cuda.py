"""The CUDA kernels without a GPU: the very kernels, run thread by thread on the host, and the machine code they became.

What needs a GPU is in tests/gpu.
"""

from __future__ import annotations

import ctypes
import importlib.util
import re
import shutil
import subprocess
import sysconfig
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from gptq_backend import QuantizedWeight
from gptq_backend.format import encode, read_packed
from gptq_backend.kernels import PreparedWeight, reference
from gptq_backend.kernels.cuda import operators as cuda
from gptq_backend.kernels.cuda import plan as cuda_plan
from gptq_backend.kernels.cuda.plan import Plan
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import LIMITS, assert_same_packed, error, exact, prepared

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "csrc" / "cuda"
# All kernels that the plans can name, with K shared among unlike numbers of warps and blocks.
PLANS = [
    *(Plan(strips, tokens, warps) for strips, tokens in ((1, 1), (2, 1), (2, 2)) for warps in (1, 3, 8)),
    *(Plan(0, tokens, splits=splits) for tokens in (2, 4, 8) for splits in (1, 3)),
    None,
]
Seed = Callable[[int], None]


@pytest.fixture(scope="session")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> tuple[ModuleType, Seed]:
    """The extension, compiled for the host."""
    if not (compiler := shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("the emulator needs a C++ compiler")
    folder = tmp_path_factory.mktemp("emulator")
    emulator_folder = ROOT / "tests" / "kernels" / "cuda_emulator"
    includes = [SOURCES, emulator_folder, sysconfig.get_path("include")]
    command = [compiler, "-std=c++17", "-O1", "-fPIC", "-Wall", "-Wno-unknown-pragmas", "-Werror"]
    command += [f"-I{path}" for path in includes]

    def compile_one(source: Path) -> Path:
        done = folder / (source.name + ".o")
        language = ["-x", "c++"] if source.suffix == ".cu" else []
        subprocess.run([*command, *language, "-c", str(source), "-o", str(done)], check=True)
        return done

    sources = [*SOURCES.glob("*.cu"), *SOURCES.glob("*.cpp"), emulator_folder / "emulator.cpp"]
    with ThreadPoolExecutor(2) as pool:
        objects = list(pool.map(compile_one, sources))
    library = folder / "_cuda.so"
    subprocess.run([compiler, "-shared", *map(str, objects), "-o", str(library)], check=True)
    spec = importlib.util.spec_from_file_location("emulated._cuda", library)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    seed = ctypes.CDLL(str(library)).emulator_seed
    seed.argtypes = [ctypes.c_uint64]
    return module, seed


@pytest.fixture
def emulated(emulator: tuple[ModuleType, Seed], monkeypatch: pytest.MonkeyPatch) -> Seed:
    monkeypatch.setattr(cuda, "_cuda", emulator[0])
    return emulator[1]


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
def test_every_code_meets_every_zero(bits: int, dtype: torch.dtype, emulated: Seed) -> None:
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
    emulator, bits, columns, outputs, size, rows, dtype, scales_dtype, sym, act_order, with_bias, plan, seed
) -> None:
    torch.manual_seed(seed)
    weight = random_weight(bits, columns, outputs, min(size, columns), sym=sym, act_order=act_order)
    weight = QuantizedWeight(weight.codes, weight.scales.to(scales_dtype), weight.zeros, weight.g_idx, bits)
    x = (torch.randn(rows, columns) * torch.randn(columns).exp()).to(dtype)
    bias = torch.randn(outputs).to(dtype) if with_bias else None
    expected = exact(weight, x, bias)
    slack = error(expected.to(dtype), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda, "_cuda", emulator[0])
        torch.use_deterministic_algorithms(True)  # fills what nobody has written with NaN
        try:
            served = prepared(weight, cuda.KERNEL)
            results = []
            for order in (seed, seed + 1000):  # of warps, and of when asynchronous copies land
                emulator[1](order)
                results.append(multiply(served, x, bias, plan))
        finally:
            torch.use_deterministic_algorithms(False)
    # Through the dense weight, that weight is rounded too.
    assert error(results[0], expected) < max(LIMITS[dtype], (1.5 if plan else 3) * slack)
    assert torch.equal(*results)


@pytest.mark.parametrize("plan", [Plan(1, 1, 4), Plan(0, 2, splits=2), None])
def test_a_row_that_is_not_finite_leaves_the_others_alone(plan: Plan | None, emulated: Seed) -> None:
    weight = random_weight(4, 200, 40, 64)
    served = prepared(weight, cuda.KERNEL)
    x = torch.randn(5, 200, dtype=torch.float16)
    clean = multiply(served, x, None, plan)
    x[2, 7] = float("nan")
    dirty = multiply(served, x, None, plan)
    assert dirty[2].isnan().all()
    keep = [0, 1, 3, 4]
    assert torch.equal(dirty[keep], clean[keep])


def test_a_machine_without_a_gpu_is_told_so(emulated: Seed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    spec = prepared(random_weight(4, 96, 40, 32), reference.KERNEL).spec
    assert cuda.supports(spec, torch.device("cuda")) == "torch sees no CUDA device"
    assert cuda.supports(spec, torch.device("cpu")) == "serves NVIDIA GPUs"


@pytest.mark.parametrize("shape", [(0, 96), (2, 0, 96)])
def test_no_rows(shape: tuple[int, ...], emulated: Seed) -> None:
    served = prepared(random_weight(4, 96, 40, 32), cuda.KERNEL)
    assert served.multiply(torch.ones(shape), None).shape == (*shape[:-1], 40)


def test_views_that_start_anywhere(emulated: Seed) -> None:
    """Rows that are not aligned, not contiguous, or more than two-dimensional."""
    weight = random_weight(4, 96, 40, 32)
    served = prepared(weight, cuda.KERNEL)
    flat = torch.randn(3 * 4 * 96 + 1, dtype=torch.float16)
    for x in (flat[1:].view(3, 4, 96), flat[:-1].view(96, 12).t(), flat[:-1].view(12, 96)[::2]):
        assert error(served.multiply(x), exact(weight, x, None)) < 5e-4


@pytest.mark.parametrize("act_order", [False, True])
def test_the_dense_weight_is_that_of_the_layer(act_order: bool, emulated: Seed) -> None:
    weight = random_weight(3, 100, 40, 32, act_order=act_order)
    served = prepared(weight, cuda.KERNEL)
    _, spec, tensors, _ = served
    layout = [tensors.get(name) for name in ("qweight", "scales", "zeros", "perm")]
    dense = cuda.dequantize(*layout, spec.in_features, spec.out_features, spec.bits, torch.float32)
    assert torch.equal(dense.t(), weight.dequantize(torch.float32))


def test_wrong_inputs_are_refused(emulated: Seed) -> None:
    served = prepared(random_weight(4, 96, 40, 32), cuda.KERNEL)
    for x in (torch.ones(3, 95), torch.ones(3, 96, dtype=torch.int32), torch.ones(3, 96, device="meta")):
        with pytest.raises(ValueError, match="expected floating point with a last dimension of 96 on cpu"):
            served.multiply(x)
    for bias in (torch.ones(39), torch.ones(40, device="meta")):
        with pytest.raises(ValueError, match="bias is .* expected \\(40,\\) on cpu"):
            served.multiply(torch.ones(3, 96), bias)


def test_a_plan_without_a_kernel_is_refused(emulated: Seed) -> None:
    served = prepared(random_weight(4, 96, 40, 32), cuda.KERNEL)
    with pytest.raises(ValueError, match="no kernel with 3 strips"):
        multiply(served, torch.ones(1, 96, dtype=torch.float16), None, Plan(3, 1))


@given(
    rows=st.integers(1, 5000),
    outputs=st.integers(1, 70000),
    tiles=st.integers(1, 500),
    bits=st.sampled_from([2, 3, 4, 8]),
    processors=st.integers(1, 200),
    shared=st.sampled_from([64, 99, 163, 227]),
)
def test_every_plan_has_a_kernel_that_fits_and_gives_each_block_work(
    rows, outputs, tiles, bits, processors, shared
) -> None:
    plan = cuda_plan.plan(rows, outputs, tiles, bits, processors, shared << 10)
    if plan is None:
        assert rows > 16
        return
    assert (plan.strips, plan.tokens) in {(1, 1), (2, 1), (2, 2), (0, 2), (0, 4), (0, 8)}
    assert 1 <= plan.splits <= max(1, tiles // 4)
    assert plan.warps * plan.strips * plan.tokens * 512 <= 48 * 1024
    assert plan.strips or cuda_plan._wide_bytes(bits, plan.tokens) <= shared << 10
    assert plan.warps <= 8 or (plan.strips, plan.tokens) == (1, 1)


# -- machine code ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def machine_code() -> dict[tuple[str, str], str]:
    """{(architecture, kernel): its SASS with resource usage}, of the extension as it was installed."""
    if cuda._cuda is None:
        pytest.skip(cuda._MISSING)
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    if not (tool := shutil.which("cuobjdump") or (beside and shutil.which("cuobjdump", path=str(beside)))):
        pytest.skip("no cuobjdump: neither a full CUDA toolkit nor triton is installed")

    def dump(what: str) -> str:
        return subprocess.run([tool, what, cuda._cuda.__file__], check=True, capture_output=True, text=True).stdout

    found: dict[tuple[str, str], str] = {}
    for arch, text in re.findall(r"arch = (\S+)(.*?)(?=\narch = |\Z)", dump("--dump-sass"), re.DOTALL):
        for name, body in re.findall(r"Function : (\S+)(.*?)(?=\n\s*Function : |\Z)", text, re.DOTALL):
            found[arch, name] = body
    usage = dump("--dump-resource-usage")
    for arch, text in re.findall(r"arch = (\S+)(.*?)(?=\narch = |\Z)", usage, re.DOTALL):
        for name, numbers in re.findall(r"Function (\S+):\n\s*(.*)", text):
            if (arch, name) in found:
                found[arch, name] = numbers + "\n" + found[arch, name]
    assert found
    return found


def test_no_kernel_spills(machine_code: dict[tuple[str, str], str]) -> None:
    for key, code in machine_code.items():
        assert re.search(r"STACK:0 .*LOCAL:0 ", code), (key, code.partition("\n")[0])
        assert not re.search(r"\b(LDL|STL)\b", code), key


def test_blocks_find_the_registers_that_they_want(machine_code: dict[tuple[str, str], str]) -> None:
    """A multiprocessor has 65536; plans give the smallest skinny kernel up to 16 warps, all others 8."""
    for key, code in machine_code.items():
        warps = 16 if "skinny" in key[1] and key[1].endswith("ELi1ELi1EEEvNS_7ProductE") else 8
        registers = re.search(r"REG:(\d+)", code)
        assert registers
        assert int(registers[1]) * 32 * warps <= 65536, key


def test_weights_arrive_in_wide_loads_and_meet_matrix_units(machine_code: dict[tuple[str, str], str]) -> None:
    """Loads of 16 bytes per lane for 4 and 8 bits, of 8 for 2 and 3; the wide kernel copies 16 at a time."""
    checked = 0
    for (arch, name), code in machine_code.items():
        product = re.search(r"(skinny|wide)_kernelILi(\d)ENS_(3F16|4BF16)E", name)
        if not product:
            continue
        kind, bits, dtype = product.groups()
        if arch == "sm_75":
            assert "HMMA.1688.F32" in code or dtype == "4BF16"
            continue
        assert ("HMMA.16816.F32.BF16" if dtype == "4BF16" else "HMMA.16816.F32 ") in code, (arch, name)
        if kind == "wide":
            assert re.search(r"LDGSTS\.E\S*\.128", code), (arch, name)
            assert "LDS.128" in code
        else:
            width = "128" if bits in "48" else "64"
            assert re.search(rf"LDG\.E\.(NA\.)?\S*{width}\S*", code), (arch, name)
        checked += 1
    assert checked >= 2 * 4 * 6


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("arch", ["75", "80", "86", "89", "90a", "100a", "120a"])
def test_every_architecture_compiles_without_spilling(arch: str, tmp_path: Path) -> None:
    if not (nvcc := shutil.which("nvcc")):
        pytest.skip("no nvcc")
    for source in SOURCES.glob("*.cu"):
        command = [nvcc, "-std=c++17", "-O3", "-Xptxas", "-v", "-cubin", f"-arch=sm_{arch}", str(source)]
        done = subprocess.run([*command, "-o", str(tmp_path / "cubin")], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        spills = re.findall(r"(\d+) bytes spill stores", done.stderr)
        assert spills
        assert set(spills) == {"0"}, (arch, source.name)
