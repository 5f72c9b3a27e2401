"""The Triton kernels, without a GPU: exact in Triton's interpreter, compiled for the GPUs that they are for.

The interpreter has to be on before triton is imported, and the compiler cannot run with it: the tests of numbers are in
interpret_triton.py and interpret_columns.py and run in a process of their own.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tempfile
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from gptq_backend.algorithm.grid import Grid
from gptq_backend.format import encode
from gptq_backend.kernels import PreparedWeight, Routing
from gptq_backend.kernels.triton import operators as triton_ops
from gptq_backend.kernels.triton import plan as triton_plan
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import LIMITS, error, exact, packed, prepared
from tests.kernels.test_experts import arguments, check_experts, stacked

triton = pytest.importorskip("triton", reason="triton is not installed; it is part of the test extra")
from gptq_backend.algorithm import columns_triton as triton_columns  # noqa: E402
from tests.kernels.triton_compiler import Compiler  # noqa: E402

ROOT = Path(__file__).parents[2]
INTERPRETED = ("tests/kernels/interpret_triton.py", "tests/algorithm/interpret_columns.py")
CPU = torch.device("cpu")

# -- the layout, in plain torch ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_codes_take_no_more_than_their_bits(bits: int) -> None:
    _, _, tensors, _ = prepared(random_weight(bits, 1024, 64, 128), triton_ops.KERNEL)
    assert tensors["qweight"].nbytes == 1024 * 64 * bits // 8
    assert "perm" not in tensors
    assert "groups" not in tensors


# -- who is served -----------------------------------------------------------------------------------------------------


def test_says_why_it_does_not_serve(monkeypatch: pytest.MonkeyPatch) -> None:
    spec, _ = encode(random_weight(4, 64, 32, 32))
    assert triton_ops.supports(spec, CPU) == "serves GPUs"
    monkeypatch.setattr(triton_ops, "_missing", lambda: "triton is not there")
    for device in ("cuda", "xpu"):
        assert triton_ops.supports(spec, torch.device(device)) == "triton is not there"
    monkeypatch.setattr(triton_ops, "_missing", lambda: None)
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "is_available", lambda: False)
    for device in ("cuda", "xpu"):
        assert triton_ops.supports(spec, torch.device(device)) == f"torch sees no {device} device"
    for module in (torch.cuda, torch.xpu):
        monkeypatch.setattr(module, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert "needs compute capability 8.0, Tesla T4" in str(triton_ops.supports(spec, torch.device("cuda")))
    assert triton_ops.supports(spec, torch.device("xpu")) is None


def test_a_machine_without_triton_is_told_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    assert "pip install triton" in str(triton_ops._missing.__wrapped__())


# The least shared memory of a device that is served by the row of the heuristics: bytes.
SHARED = {"sm_80": 99 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10, "gfx1100": 64 << 10, "xpu": 64 << 10}

UNCACHED = {name: getattr(triton_plan, name).__wrapped__ for name in ("plan", "fitting_tiles")}


def use_machine(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    machine = triton_plan.Machine(triton_plan.HEURISTICS[name], 132, SHARED[name])
    monkeypatch.setattr(triton_plan, "machine", lambda device: machine)
    for name, function in UNCACHED.items():
        monkeypatch.setattr(triton_plan, name, function)


@pytest.mark.parametrize("machine", triton_plan.HEURISTICS)
def test_every_split_has_work_and_none_is_lost(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_machine(monkeypatch, machine)
    for rows in (1, 2, 16, 17, 100, 511):
        for columns in (1, 100, 4096, 57344):
            for slabs in (1, 2, 7, 32, 86, 224):
                tile, splits = triton_plan.plan(rows, columns, slabs, 4, 2, CPU)
                share = -(-slabs // splits)
                assert (splits - 1) * share < slabs <= splits * share
                assert tile.rows >= rows or tile.rows == triton_plan.HEURISTICS[machine].tiles[-1].rows


@pytest.mark.parametrize("machine", triton_plan.HEURISTICS)
def test_blocks_of_experts_have_a_tile_in_every_format(machine: str, monkeypatch: pytest.MonkeyPatch) -> None:
    use_machine(monkeypatch, machine)
    for rows in (1, 100, 10000):
        block = triton_plan.moe_rows(rows, 8, CPU)
        for bits in (2, 3, 4, 8):
            for itemsize in (2, 4):
                assert block in [tile.rows for tile in triton_plan.fitting_tiles(bits, itemsize, CPU)]


@pytest.mark.parametrize(("lanes", "row"), [(64, "gfx942"), (32, "gfx1100")])
def test_amd_gpus_take_the_tiles_for_their_waves(lanes: int, row: str, monkeypatch: pytest.MonkeyPatch) -> None:
    properties = types.SimpleNamespace(warp_size=lanes, multi_processor_count=96)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    monkeypatch.setattr(torch.version, "hip", "7.0")
    found = triton_plan.machine.__wrapped__(torch.device("cuda"))
    assert found == triton_plan.Machine(triton_plan.HEURISTICS[row], 96, 64 << 10)


# -- numbers, in the interpreter ---------------------------------------------------------------------------------------


def test_the_interpreter_agrees() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *INTERPRETED],
        env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert re.search(r"^\d+ passed", done.stdout.splitlines()[-1])


def test_x_that_cannot_be_read_is_refused() -> None:
    served = prepared(random_weight(4, 64, 32, 32), triton_ops.KERNEL)
    for x in (torch.randn(2, 63), torch.ones(2, 64, dtype=torch.int64), torch.empty(2, 64, device="meta")):
        with pytest.raises(ValueError, match="expected floating point with a last dimension of 64 on cpu"):
            served.multiply(x)


# -- compiled for GPUs -------------------------------------------------------------------------------------------------


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[str], Compiler]:
    """By the name of a target."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))

    def make(target: str) -> Compiler:
        compiler = Compiler(target)
        monkeypatch.setattr(triton_ops, "_kernels", lambda: compiler)
        use_machine(monkeypatch, target)
        return compiler

    return make


def resources(compiled: Any) -> dict[str, int]:
    """Of NVIDIA machine code: registers, and bytes of stack and local memory, where spilled registers go."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}


def assert_fast(target: str, name: str, compiled: Any, dtype: torch.dtype) -> None:
    """It fits, no register is spilled, weights are loaded 16 bytes at a time, products are those of matrix units."""
    assert compiled.metadata.shared <= SHARED[target]
    if assembly := compiled.asm.get("amdgcn"):
        if dtype != torch.float32 or target == "gfx942":  # others' products in float32 take no matrix unit
            assert re.findall(r"[vs]gpr_spill_count: +(\d+)", assembly) == ["0", "0"]
        wide, matrix = ("_load_dwordx4", "v_mfma") if target == "gfx942" else ("_load_b128", "v_wmma")
    else:
        assembly = compiled.asm["ptx"]
        if dtype != torch.float32:  # as above
            assert resources(compiled)["STACK"] == resources(compiled)["LOCAL"] == 0
        wide = r"cp\.async\.cg\.shared\.global[^;]*, 0x10,|ld\.global[^;]*\.v4\.b32"
        matrix = r"wgmma\.mma_async" if compiled.metadata.target.arch == 90 else r"mma\.sync"
    if name in ("gemm", "gemv", "dequantize"):
        assert re.search(wide, assembly), name
    if name == "gemm" and dtype != torch.float32:
        assert re.search(matrix, assembly)


def compile_everything(compiler: Compiler, bits: int, dtype: torch.dtype, rows: int, **weight: Any) -> None:
    """What is launched for so many rows, and for so many that the weight is dequantized."""
    served = prepared(random_weight(bits, 1024, 256, 128, **weight), triton_ops.KERNEL)
    served.multiply(torch.empty(rows, 1024, dtype=dtype), torch.empty(256, dtype=dtype))
    gathers = rows > 1 and weight["act_order"]
    assert compiler.compiled.keys() == {"add_splits", "gemv" if rows == 1 else "gemm"} | (
        {"gather"} if gathers else set()
    )
    served.multiply(torch.empty(600, 1024, dtype=dtype), None)
    for name, compiled in compiler.compiled.items():
        assert_fast(compiler.name, name, compiled, dtype)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize(
    ("bits", "rows", "sym", "act_order"), [(4, 1, True, False), (4, 64, False, True), (3, 16, True, False)]
)
def test_compiles_without_spilling(compiler, target: str, bits: int, rows: int, sym: bool, act_order: bool) -> None:
    compile_everything(compiler(target), bits, torch.bfloat16, rows, sym=sym, act_order=act_order)


@pytest.mark.slow
@pytest.mark.parametrize("target", ["sm_80", "sm_90", "gfx942", "gfx1100"])
@pytest.mark.parametrize(
    ("bits", "dtype"),
    [(2, torch.bfloat16), (3, torch.bfloat16), (4, torch.float16), (8, torch.bfloat16), (4, torch.float32)],
)
@pytest.mark.timeout(900)
def test_every_tile_of_the_heuristics_compiles_without_spilling(compiler, target, bits, dtype) -> None:
    for tile in triton_plan.HEURISTICS[target].tiles:
        for sym, act_order in ((True, False), (False, True)):
            compile_everything(compiler(target), bits, dtype, tile.rows, sym=sym, act_order=act_order)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
def test_experts_compile_without_spilling(compiler, target: str) -> None:
    made = compiler(target)
    each, stack = stacked(triton_ops.KERNEL, [random_weight(4, 1024, 256, 128, i) for i in range(2)])
    x = torch.empty(2, 1024, dtype=torch.bfloat16)
    triton_ops.EXPERTS.gemm(x, arguments(each, stack), Routing(torch.tensor([[0, 1], [1, 0]]), 2), 2, None)
    assert_fast(target, "gemm", made.compiled["gemm"], torch.bfloat16)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("descent", [False, True])
def test_the_column_loop_compiles_without_spilling(target, descent, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    made = Compiler(target, triton_columns)
    for name in ("round_panel", "rounding_cost"):
        monkeypatch.setattr(triton_columns, name, getattr(made, name))
    count, width = (32, 256) if descent else (128, 256)
    rest, one = torch.empty(count, width), torch.ones(3, width)
    grids, groups = Grid(one, one, one, one), torch.zeros(count, dtype=torch.int32)
    start = (rest.clone(), rest[:, 0].clone()) if descent else None
    triton_columns.round_columns(rest, torch.zeros(count, count), grids, groups, rest.clone(), start)
    triton_columns.rounding_costs(rest, rest[:, 0].clone(), grids)
    assert made.compiled.keys() == {"round_panel", "rounding_cost"}
    for compiled in made.compiled.values():
        if assembly := compiled.asm.get("amdgcn"):
            assert re.findall(r"[vs]gpr_spill_count: +(\d+)", assembly) == ["0", "0"]
        else:
            used = resources(compiled)
            assert used["STACK"] == used["LOCAL"] == 0
        assert compiled.metadata.shared <= SHARED[target]


# -- on a GPU ----------------------------------------------------------------------------------------------------------


@pytest.mark.gpu
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("sym", "act_order"), [(True, False), (False, True)])
def test_gpu_agrees_with_float64(bits: int, dtype: torch.dtype, sym: bool, act_order: bool) -> None:
    for columns, outputs, size in [(4096, 4096, 128), (530, 100, 48), (64, 17, 64)]:
        weight = random_weight(bits, columns, outputs, size, act_order=act_order, sym=sym)
        served = PreparedWeight.of(packed(weight).to(torch.device("cuda")), triton_ops.KERNEL)
        bias = torch.randn(outputs, dtype=dtype)
        for rows in (1, 2, 16, 17, 64, 100, 600):
            x = torch.randn(rows, columns).to(dtype)
            y = served.multiply(x.cuda(), bias.cuda()).cpu()
            # The dense path rounds weights to the dtype of x.
            assert error(y, exact(weight, x, bias)) < LIMITS[dtype] * (1 if rows < 512 else 2)


@pytest.mark.gpu
def test_gpu_repeats_bit_for_bit_and_is_captured() -> None:
    served = PreparedWeight.of(
        packed(random_weight(4, 4096, 512, 128, act_order=True)).to(torch.device("cuda")), triton_ops.KERNEL
    )
    for rows in (1, 16):
        x = torch.randn(rows, 4096, device="cuda", dtype=torch.float16)
        first = served.multiply(x)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            y = served.multiply(x)
        for _ in range(3):
            y.fill_(float("nan"))
            graph.replay()
            assert torch.equal(y, first)


@pytest.mark.gpu
@pytest.mark.parametrize("act_order", [False, True])
def test_gpu_experts(act_order: bool) -> None:
    check_experts(
        triton_ops.KERNEL, 4, act_order, torch.bfloat16, torch.randint(-1, 4, (50, 2)), 2, torch.device("cuda")
    )
