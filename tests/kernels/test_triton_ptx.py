"""The Triton kernels as Triton compiles them for sm_80: their PTX, run on the host, against float64.

Triton's interpreter (interpret_triton.py) runs the programs; here its compiler is in the loop, with its layouts,
pipelines of asynchronous copies and barriers, and bf16, which the interpreter multiplies wrongly.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from gptq_backend import QuantizedWeight
from gptq_backend.kernels.triton import operators as triton_ops
from gptq_backend.kernels.triton import plan as triton_plan
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import LIMITS, error, exact, prepared
from tests.kernels.ptx.machine import Machine
from tests.kernels.test_experts import IDS, check_experts

pytest.importorskip("triton", reason="triton is not installed; it is part of the test extra")
from tests.kernels.ptx.triton_launcher import Launcher

pytestmark = [pytest.mark.slow, pytest.mark.timeout(600)]

DTYPES = [torch.float16, torch.bfloat16]
# The rows of every tile, one row less, and more rows than the largest has.
ROWS = (1, 2, 16, 32, 63, 100)


@pytest.fixture
def launcher(machine: Machine, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Launcher]:
    """In the place of the Triton kernels. What nobody has written is NaN."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    launcher = Launcher(machine)
    monkeypatch.setattr(triton_ops, "_kernels", lambda: launcher)
    monkeypatch.setattr(triton_ops, "moe_op", triton_ops.moe_gemm)  # an operator would hide what it allocates
    torch.use_deterministic_algorithms(True)
    yield launcher
    torch.use_deterministic_algorithms(False)


def check_product(machine: Machine, weight: QuantizedWeight, rows: int, dtype: torch.dtype, seed: int) -> None:
    torch.manual_seed(seed)
    machine.seed(seed)
    outputs, columns = weight.codes.shape[1], weight.codes.shape[0]
    x, bias = torch.randn(rows, columns).to(dtype), torch.randn(outputs).to(dtype)
    with machine.memory(x, bias):
        y = prepared(weight, triton_ops.KERNEL).multiply(x, bias)
    assert error(y, exact(weight, x, bias)) < LIMITS[dtype], (rows, columns, outputs)


# The compiler takes seconds for each kernel: the forms of weights are dealt out to the tests, not tried everywhere.


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_tile(bits: int, dtype: torch.dtype, launcher: Launcher, machine: Machine) -> None:
    """Matrix units and none; K in one part and in several; with channels in order and gathered."""
    tiles = [tile.rows for tile in triton_plan.HEURISTICS["sm_80"].tiles]
    for rows in ROWS:
        number = sum(rows > each for each in tiles[:-1])  # of the tile that serves so many rows
        act_order = (number + DTYPES.index(dtype)) % 2 == 1
        launcher.launched.clear()
        for columns, outputs in ((600, 150), (1100, 17)):
            weight = random_weight(bits, columns, outputs, 128, sym=not act_order, act_order=act_order)
            check_product(machine, weight, rows, dtype, rows)
        assert set(launcher.launched) == {"gemv" if rows == 1 else "gemm", "add_splits"} | (
            {"gather"} if act_order and rows > 1 else set()
        )


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("rows", "dtype"), [(1, torch.float16), (3, torch.bfloat16)])
def test_shapes_that_no_tile_divides(
    bits: int, rows: int, dtype: torch.dtype, launcher: Launcher, machine: Machine
) -> None:
    for columns, outputs, size, act_order in ((7, 1, 7, False), (96, 33, 48, True)):
        check_product(machine, random_weight(bits, columns, outputs, size, act_order=act_order), rows, dtype, columns)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("dtype", "act_order"), [(torch.float16, True), (torch.bfloat16, False)])
def test_experts(bits: int, dtype: torch.dtype, act_order: bool, launcher: Launcher, machine: Machine) -> None:
    for ids in IDS:
        with machine.memory(ids):
            check_experts(triton_ops.KERNEL, bits, act_order, dtype, ids, parts=2 if act_order else 1)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(
    ("dtype", "act_order"), [(torch.float16, False), (torch.bfloat16, True), (torch.float32, False)]
)
def test_the_dense_weight_is_that_of_the_layer(
    bits: int, dtype: torch.dtype, act_order: bool, launcher: Launcher, machine: Machine
) -> None:
    weight = random_weight(bits, 300, 150, 64, act_order=act_order)
    with machine.memory():
        served = prepared(weight, triton_ops.KERNEL)
        dense = triton_ops.dequantize(*triton_ops.KERNEL.layout.arguments(served.spec, served.tensors), dtype)
    assert torch.equal(dense.t(), weight.dequantize(torch.float32).to(dtype))
