"""How long would a 4-bit product take on GPUs that are not here? A model, from instructions that are counted.

    python docs/benchmarks/gpu_model.py docs/benchmarks/gpu-model.json

The PTX of a kernel runs on the host (tests/kernels/ptx) for one block, which tells how often its warps multiply and
load. sass_path.py finds how many machine instructions that takes at least, for two sizes of K: so many for a tile, and
so many beside. The time is the longest of three: the bytes at 85% of the bandwidth; and on the multiprocessor with the
most blocks the instructions at 0.6 a clock and scheduler, and the matrix products at 80% of the peak of ``mma.sync``.
Products through the dense weight write and read it, and multiply at 80% of the peak of cuBLAS. Latency, launches and
caches are left out: no time here is a measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from sass_path import fewest_instructions, marks_of_ptx

from gptq_backend.kernels.cuda import loading, nvrtc
from gptq_backend.kernels.cuda import operators as cuda
from gptq_backend.kernels.cuda.machine_code import Image
from gptq_backend.kernels.cuda.plan import Gpu as Device
from gptq_backend.kernels.cuda.plan import Plan, plan
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import prepared
from tests.kernels.ptx.machine import Machine
from tests.kernels.test_cuda_machine_code import disassembled

BITS, SIZE, COLUMNS, OUTPUTS = 4, 128, 8192, 8192
ROWS = (1, 8, 16, 32, 64, 128, 256, 512, 1024, 2048)
ISSUED, BANDWIDTH, PRODUCTS = 0.6, 0.85, 0.8  # instructions a clock and scheduler; shares of the peaks
TYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
KERNELS = [
    *(Plan(strips, tokens) for strips in (1, 2) for tokens in (1, 2)),
    *(Plan(0, tokens) for tokens in (2, 4, 8)),
]


@dataclass(frozen=True)
class Gpu:
    """clock: GHz. bandwidth: GB/s. sync, dense: TFLOPS in fp16 with sums in float32, of mma.sync and of cuBLAS."""

    name: str
    clock: float
    bandwidth: float
    sync: float
    dense: float
    device: Device


GPUS = (
    Gpu("A100 SXM 80 GB", 1.41, 2039, 312, 312, Device(108, 163 << 10, (8, 0))),
    Gpu("H100 SXM", 1.755, 3350, 620, 989, Device(132, 227 << 10, (9, 0))),
    Gpu("RTX 4090", 2.52, 1008, 165, 165, Device(128, 99 << 10, (8, 9))),
)


@dataclass(frozen=True)
class Counted:
    """Machine instructions of a warp: for a tile of K, beside, and matrix products for a tile; registers of a thread.

    Of a wide kernel, tiles are those of its block, of which a warp multiplies half.
    """

    kernel: str
    size: int
    tile: float
    beside: float
    products: float
    registers: int


class Counter:
    """Counts what the warps of a block execute."""

    def __init__(self, folder: Path) -> None:
        compiler = nvrtc.find_compiler()
        self._machine = Machine(shutil.which("g++") or "clang++", folder)
        self._machine.load(compiler.compile(BITS, "compute_80").rstrip(b"\0").decode())
        self._code = disassembled(compiler.compile(BITS, "sm_80"), folder)
        self._known: dict[tuple[Plan, str, int], Counted] = {}
        loading.images = lambda bits, capability: iter([Image("PTX", lambda: b"PTX")])
        loading.open_driver = lambda: None
        self._machine.start()

    def count(self, how: Plan, of_type: str = "f16", size: int = SIZE) -> Counted:
        """Symmetric, with scales in fp16 and groups of so many input channels."""
        how = Plan(how.strips, how.tokens)
        if (how, of_type, size) not in self._known:
            kind = f"skinny_{how.strips}_{how.tokens}" if how.strips else f"wide_{how.tokens}"
            name, tiles = f"gptq_{kind}_{BITS}_{of_type}", (8, 16) if how.strips else (16, 32)
            warps = how.warps if how.strips else 1  # that share K
            few, many = (self._warp(how, name, TYPES[of_type], size, count * warps * 64) for count in tiles)
            step, registers = tiles[1] - tiles[0], re.search(r"REG:(\d+)", self._code[name])
            assert registers
            tile = (many[0] - few[0]) / step
            beside, products = few[0] - tile * tiles[0], (many[1] - few[1]) / step
            self._known[how, of_type, size] = Counted(name, size, tile, beside, products, int(registers[1]))
        return self._known[how, of_type, size]

    def _warp(self, how: Plan, name: str, dtype: torch.dtype, size: int, columns: int) -> tuple[int, int]:
        """Instructions and matrix products of a warp in a block for so many input channels."""
        before = self._machine.executed(name)
        x = torch.randn(how.tokens * 8, columns).to(dtype)
        with self._machine.memory(x):
            weight = random_weight(BITS, columns, 16 * (how.strips or 8), size, sym=True)
            served = prepared(weight, cuda.KERNEL)
            fields = cuda.WeightFields(*cuda.KERNEL.layout.arguments(served.spec, served.tensors))
            cuda.planned_gemm(x, fields, None, how)
        after = self._machine.executed(name)
        executed = [(text, count - earlier) for (text, count), (_, earlier) in zip(after, before)]
        marks = marks_of_ptx(executed, how.warps)
        return fewest_instructions(self._code[name], marks), marks.products


def by_kernel(gpu: Gpu, rows: int, how: Plan, counted: Counted) -> dict[str, float]:
    """Microseconds of a product by a kernel: of its bytes, its instructions and its matrix products."""
    blocks = math.ceil(OUTPUTS / 16 / (how.strips or 8)) * math.ceil(rows / (how.tokens * 8)) * how.splits
    busiest = math.ceil(blocks / gpu.device.processors)
    tiles = math.ceil(COLUMNS / 64 / (how.warps if how.strips else how.splits))
    instructions = busiest * how.warps * (counted.beside + tiles * counted.tile)
    products = busiest * how.warps * tiles * counted.products * 16 * 8 * 16 * 2
    partials = 8 * rows * OUTPUTS * how.splits if how.splits > 1 else 0  # written, and read again
    moved = COLUMNS * OUTPUTS * BITS / 8 + COLUMNS // SIZE * OUTPUTS * 2 + 2 * rows * (COLUMNS + OUTPUTS) + partials
    times = {
        "bytes": moved / (BANDWIDTH * gpu.bandwidth * 1e3),
        "instructions": instructions / (4 * ISSUED * gpu.clock * 1e3),
        "products": products / (PRODUCTS * gpu.sync / gpu.device.processors * 1e6),
    }
    return {name: round(time, 1) for name, time in times.items()}


def by_cublas(gpu: Gpu, rows: int) -> float:
    """Microseconds of a product with weights in 16 bits."""
    moved = 2 * COLUMNS * OUTPUTS + 2 * rows * (COLUMNS + OUTPUTS)
    products = 2 * rows * COLUMNS * OUTPUTS / (PRODUCTS * gpu.dense * 1e6)
    return round(max(moved / (BANDWIDTH * gpu.bandwidth * 1e3), products), 1)


def predict(gpu: Gpu, rows: int, counter: Counter) -> dict[str, Any]:
    """Microseconds: of the product as planned, through the dense weight, and with weights in 16 bits."""
    how = plan(rows, OUTPUTS, COLUMNS // 64, BITS, gpu.device)
    dense = by_cublas(gpu, rows)
    dequantizing = (BITS / 8 + 2) * COLUMNS * OUTPUTS / (BANDWIDTH * gpu.bandwidth * 1e3)
    times = (
        {"through the dense weight": round(dequantizing + dense, 1)}
        if how is None
        else by_kernel(gpu, rows, how, counter.count(how))
    )
    through = round(dequantizing + dense, 1)
    return {"gpu": gpu.name, "rows": rows, "plan": str(how), **times, "dequantized": through, "16 bits": dense}


def print_tables(before: dict[str, Any], after: dict[str, Any]) -> None:
    """Of the kernels, and of the products in both states."""
    for each in after["kernels"]:
        kind = each["kernel"].removeprefix("gptq_")
        strips = int(kind.split("_")[1]) if kind.startswith("skinny") else 0
        weights = round(each["tile"] / strips, 1) if strips else ""
        blocks = 65536 // (math.ceil(each["registers"] / 8) * 8 * 256)  # of 8 warps; shared memory may allow fewer
        cells = (kind, each["size"], weights, round(each["tile"] / each["products"], 2), each["registers"], blocks * 8)
        print("| " + " | ".join(map(str, cells)) + " |")
    old = {(row["gpu"], row["rows"]): row for row in before["products"]}
    for rows in ROWS:
        cells = [rows]
        for row in after["products"]:
            if row["rows"] == rows:
                was = old.get((row["gpu"], rows))
                cells += [_longest(was) if was else row["dequantized"], _longest(row), row["16 bits"]]
        print("| " + " | ".join(map(str, cells)) + " |")


def _longest(row: dict[str, Any]) -> str:
    """The time of a product, and what it is bound by."""
    times = ("bytes", "instructions", "products", "through the dense weight")
    what = max((name for name in times if name in row), key=row.__getitem__)
    return f"{row[what]} ({what.removeprefix('through the ')})"


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("json", type=Path)
    parser.add_argument("--before", type=Path, help="count nothing: print tables of this JSON beside the other")
    asked = parser.parse_args()
    where = asked.json
    if asked.before:
        print_tables(*(json.loads(path.read_text()) for path in (asked.before, where)))
        return
    with tempfile.TemporaryDirectory() as folder:
        counter = Counter(Path(folder))
        counts = [counter.count(how) for how in KERNELS]
        kinds = (("bf16", 128), ("f16", 64), ("f16", 32))
        counts += [counter.count(how, *kind) for how in (Plan(1, 1), Plan(0, 8)) for kind in kinds]
        rows = [predict(gpu, rows, counter) for rows in ROWS for gpu in GPUS]
    result = {"bits": BITS, "K": COLUMNS, "N": OUTPUTS, "kernels": list(map(asdict, counts)), "products": rows}
    where.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
