"""How long would a 4-bit product take on GPUs that are not here? A model, from instructions that are counted.

    python docs/benchmarks/gpu_model.py docs/benchmarks/gpu-model.json

The PTX of the kernel that the plan chooses runs on the host (tests/kernels/ptx) for a slice of the output channels, and
its instructions are counted as warps execute them. How many machine instructions one of PTX becomes is taken from the
two texts of the whole kernel. The time is the longest of three: the bytes at 85% of the bandwidth, and on the
multiprocessor with the most blocks the instructions at 0.6 a clock and scheduler, and the matrix products at the peak
of ``mma.sync``. Latency, start-up and caches are left out: no time here is a measurement.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).parents[2]))
from gptq_backend.kernels.cuda import loading, nvrtc
from gptq_backend.kernels.cuda import operators as cuda
from gptq_backend.kernels.cuda.machine_code import Image
from gptq_backend.kernels.cuda.plan import Plan, plan
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import prepared
from tests.kernels.ptx.machine import Machine
from tests.kernels.test_cuda_machine_code import disassembled

BITS, SIZE, COLUMNS, OUTPUTS = 4, 128, 8192, 8192
ROWS = (1, 8, 16, 32, 64, 128)
ISSUED, SUSTAINED = 0.6, 0.85  # instructions a clock and scheduler; share of the bandwidth


@dataclass(frozen=True)
class Gpu:
    """clock: GHz. bandwidth: GB/s. dense: TFLOPS of mma.sync in fp16 with sums in float32. shared: KB of a block."""

    name: str
    processors: int
    clock: float
    bandwidth: float
    dense: float
    shared: int


GPUS = (
    Gpu("A100 SXM 80 GB", 108, 1.41, 2039, 312, 163),
    Gpu("H100 SXM", 132, 1.755, 3350, 620, 227),
    Gpu("RTX 4090", 128, 2.52, 1008, 165, 99),
)


class Counter:
    """Counts what a block of a kernel executes."""

    def __init__(self, folder: Path) -> None:
        compiler = nvrtc.find_compiler()
        self._machine = Machine(shutil.which("g++") or "clang++", folder)
        self._ptx = compiler.compile(BITS, "compute_80").rstrip(b"\0").decode()
        self._code = disassembled(compiler.compile(BITS, "sm_80"), folder)
        loading.images = lambda bits, capability: iter([Image("PTX", lambda: b"PTX")])
        loading.open_driver = lambda: None
        self._machine.start()

    def count(self, how: Plan, rows: int) -> dict[str, Any]:
        """Of a block on average, for all rows and the whole of K."""
        names = self._machine.load(self._ptx)
        outputs = 16 * (how.strips or 8)
        x = torch.randn(rows, COLUMNS).half()
        with self._machine.memory(x):
            served = prepared(random_weight(BITS, COLUMNS, outputs, SIZE, sym=True), cuda.KERNEL)
            fields = cuda.WeightFields(*cuda.KERNEL.layout.arguments(served.spec, served.tensors))
            cuda.planned_gemm(x, fields, None, how)
        (name,) = [n for n in names if "reduce" not in n and any(count for _, count in self._machine.executed(n))]
        counts = self._machine.executed(name)
        blocks = math.ceil(rows / (how.tokens * 8)) * how.splits
        sass = len(re.findall(r"^\s+/\*[0-9a-f]{4,5}\*/", self._code[name], re.MULTILINE))
        return {
            "kernel": name,
            "executed": sum(count for _, count in counts) / blocks,
            "matrix products": sum(count for text, count in counts if "mma" in text) / blocks,
            "machine instructions per PTX instruction": round(sass / len(counts), 3),
        }


def predict(gpu: Gpu, rows: int, counter: Counter) -> dict[str, Any]:
    """Microseconds: of the product, and of one with weights in 16 bits."""
    how = plan(rows, OUTPUTS, COLUMNS // 64, BITS, gpu.processors, gpu.shared << 10)
    assert how is not None
    counted = counter.count(how, rows)
    blocks = math.ceil(OUTPUTS / 16 / (how.strips or 8)) * math.ceil(rows / (how.tokens * 8)) * how.splits
    busiest = math.ceil(blocks / gpu.processors)
    instructions = counted["executed"] * counted["machine instructions per PTX instruction"]
    other = 2 * rows * (COLUMNS + OUTPUTS)
    weight = COLUMNS * OUTPUTS * BITS / 8 + COLUMNS // SIZE * OUTPUTS * 2
    products = counted["matrix products"] * 16 * 8 * 16 * 2
    times = {
        "bytes": (weight + other) / (SUSTAINED * gpu.bandwidth * 1e3),
        "instructions": busiest * instructions / (4 * ISSUED * gpu.clock * 1e3),
        "products": busiest * products / (gpu.dense / gpu.processors * 1e6),
    }
    dense = max(
        (2 * COLUMNS * OUTPUTS + other) / (SUSTAINED * gpu.bandwidth * 1e3),
        2 * rows * COLUMNS * OUTPUTS / (gpu.dense * 1e6),
    )
    times = {name: round(time, 1) for name, time in times.items()}
    return {"gpu": gpu.name, "rows": rows, "plan": str(how), **counted, **times, "16 bits": round(dense, 1)}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    where = parser.parse_args().json
    with tempfile.TemporaryDirectory() as folder:
        counter = Counter(Path(folder))
        rows = [predict(gpu, rows, counter) for rows in ROWS for gpu in GPUS]
    where.write_text(json.dumps({"bits": BITS, "K": COLUMNS, "N": OUTPUTS, "products": rows}, indent=1) + "\n")
    for count in ROWS:
        of_gpus = [row for row in rows if row["rows"] == count]
        kernel = re.sub(r"gptq_(.*)_4_f16", r"\1", of_gpus[0]["kernel"])
        instructions = of_gpus[0]["executed"] * of_gpus[0]["machine instructions per PTX instruction"]
        cells = [count, kernel, round(instructions / of_gpus[0]["matrix products"], 1)]
        for row in of_gpus:
            longest = max(("bytes", "instructions", "products"), key=row.__getitem__)
            cells += [f"{row[longest]} ({longest})", row["16 bits"]]
        print("| " + " | ".join(map(str, cells)) + " |")


if __name__ == "__main__":
    main()
