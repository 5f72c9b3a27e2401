"""How long would a block take on 1, 8 and 64 GPUs that are not here, and how much memory? A model, not a measurement.

    python docs/benchmarks/scale_model.py docs/benchmarks/scale-model.json

It counts operations and bytes of each phase of a block as the code does them, and divides by rates of one H100 SXM and
of its links, below. The same counts divided by the seconds of a block that was measured on a CPU give the rates of that
CPU: ``rates_of_the_measured_block`` in the JSON; they have to be below its peak, and are the test of the counts.
Latency is counted for the column loop only, imbalance for output rows that are too few to share, and phases do not
overlap.
"""

from __future__ import annotations

import json
import math
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

TOKENS, BATCH = 128 * 2048, 2048
GPUS = (1, 8, 64)
HALF, SINGLE = 2, 4  # bytes
PRODUCTS = 400e12  # flop/s of bf16 products with sums in float32: 0.4 of an H100's peak
SINGLES = 30e12  # flop/s in float32: 0.45 of the peak
COLUMN = 2e-6  # seconds from one column to the next in the Triton kernels: an assumption
NVLINK, NETWORK = 360e9, 40e9  # bytes/s of a GPU to those of its machine, and of others: 0.8 of 450 GB/s and 400 Gb/s
MEMORY = 2.3e12  # bytes/s of a GPU's own memory: 0.7 of its peak
HOST, DISK = 25e9, 5e9  # bytes/s from host memory to a GPU, and from the disk of a machine
ON_A_MACHINE = 8
SWEEPS, FINALISTS, TURNS, GROUP = 2, 4, 8, 128  # quality="default"
PART_ROWS, PER_ROUND = 4096, 4  # output rows that are rounded together; experts of a rank in a round


@dataclass(frozen=True)
class Shape:
    """One block. Layers are (inputs K, all output rows that read them)."""

    name: str
    blocks: int
    hidden: int
    dense: tuple[tuple[int, int], ...]  # layers that every token passes
    mixing: int  # weights of the layers before attention has mixed tokens, and of attention's own product
    experts: int = 0
    chosen: int = 0
    expert: tuple[tuple[int, int], ...] = ()

    @property
    def weights(self) -> int:
        """In the block."""
        return _size(self.dense) + self.experts * _size(self.expert)

    @property
    def drifting(self) -> tuple[tuple[int, int], ...]:
        """Layers that make up for the drift of their inputs: none of mixtures."""
        return () if self.experts else self.dense

    @property
    def passes(self) -> int:
        """Of the quantized block, and of the original for the drift."""
        return 1 + bool(self.drifting)

    def held(self, gpus: int) -> float:
        """Weights of which one of so many GPUs needs the original: its own experts."""
        return _size(self.dense) + self.experts * _size(self.expert) / gpus


def _size(layers: tuple[tuple[int, int], ...]) -> int:
    return sum(k * n for k, n in layers)


def _llama(name: str, blocks: int, hidden: int, inner: int, keys: int) -> Shape:
    attention = ((hidden, hidden + 2 * keys), (hidden, hidden))
    return Shape(name, blocks, hidden, (*attention, (hidden, 2 * inner), (inner, hidden)), hidden * (hidden + 2 * keys))


SHAPES = (
    _llama("7B (Llama 2)", 32, 4096, 11008, 4096),
    _llama("70B (Llama 2)", 80, 8192, 28672, 1024),
    Shape(
        "235B mixture (Qwen3-235B-A22B)", 94, 4096, ((4096, 8192 + 2 * 512), (8192, 4096)), 4096 * 9216,
        128, 8, ((4096, 2 * 1536), (1536, 4096)),
    ),
    Shape(
        "671B mixture (DeepSeek-V3)", 61, 7168,
        ((7168, 1536 + 576), (1536, 24576), (512, 32768), (16384, 7168), (7168, 4096), (2048, 7168)),
        7168 * 2112 + 1536 * 24576 + 512 * 32768, 256, 8, ((7168, 2 * 2048), (2048, 7168)),
    ),
)  # fmt: skip


def work(shape: Shape, tokens: int) -> dict[str, float]:
    """Operations of a block: those shared by batches, and those of the distinct inputs of dense layers and experts."""
    active = _size(shape.dense) + shape.chosen * _size(shape.expert)
    routed = tokens * shape.chosen / shape.experts if shape.experts else 0
    return {
        "forward": 2 * active * tokens * shape.passes,
        "drift": sum(2 * 2 * k * n if n == shape.hidden else 2 * k * k for k, n in shape.drifting) * tokens,
        "sensitivity": 3 * 2 * shape.mixing * tokens,  # through attention and back
        "hessian of dense layers": sum(k * k for k, _ in shape.dense) * tokens,
        "hessian of experts": shape.experts * sum(k * k for k, _ in shape.expert) * routed,
        "factor of dense layers": sum(2 / 3 * k**3 for k, _ in shape.dense),
        "factor of an expert": sum(2 / 3 * k**3 for k, _ in shape.expert),
        "rounding of dense layers": sum(_rounding(k, n) for k, n in shape.dense),
        "rounding of an expert": sum(_rounding(k, n) for k, n in shape.expert),
    }


def _rounding(k: int, n: int) -> float:
    loop = n * k * k
    search = FINALISTS * n * k * GROUP
    sweeps = SWEEPS * (2 + 2 + 2) * n * k * k  # the gradient, the scales' normal equations, the error
    return loop + search + sweeps + 4 * n * k * k  # and the two errors of the report


def _columns(layers: tuple[tuple[int, int], ...]) -> float:
    """Seconds in which columns follow each other: the search's feedback, the loop and each sweep."""
    return sum(k for k, _ in layers) * (2 + SWEEPS) * COLUMN


def _turns(shape: Shape) -> float:
    """Seconds of the turns of row feedback in q and k, each on one rank, beside what is counted once for q, k and v."""
    return 2 * TURNS * _columns(((shape.hidden, 0),))


def seconds(shape: Shape, gpus: int) -> dict[str, float]:
    """Of each phase of a block."""
    counts, machines = work(shape, TOKENS), math.ceil(gpus / ON_A_MACHINE)
    link = NVLINK if machines == 1 else NETWORK
    others = (gpus - 1) / gpus
    parts = [min(gpus, max(1, 2 ** round(math.log2(n / PART_ROWS)))) for _, n in shape.dense]
    rounding = sum(_rounding(k, n) / part for (k, n), part in zip(shape.dense, parts, strict=True)) / SINGLES
    own = math.ceil(shape.experts / gpus)
    expert = (counts["factor of an expert"] + counts["rounding of an expert"]) / SINGLES + _columns(shape.expert)
    tokens = TOKENS * shape.chosen * shape.hidden * HALF / gpus * others
    moments = sum(k * k / 2 for k, _ in shape.dense)
    moments += 2 * sum(k * min(k, n if n == shape.hidden else k) for k, n in shape.drifting)  # of two halves
    inverses = (0.5 + 0.5 / min(gpus, 8)) / SINGLES  # of a factorization and an inverse, the second is shared out
    solvers = sum(2 / 3 * k**3 for k, _ in shape.drifting) * inverses
    made_up = sum(12 * n * k * k / part for (k, n), part in zip(shape.drifting, parts)) / SINGLES
    changes = _size(shape.drifting) * SINGLE * others
    originals = sum(k for k, _ in shape.drifting) * TOKENS / gpus
    from_disk = shape.held(gpus / min(gpus, ON_A_MACHINE)) * HALF / DISK
    all_experts = shape.experts * _size(shape.expert) * (gpus > 1)
    dequantized = all_experts * (0.5 + 2 * HALF) / MEMORY * TOKENS / BATCH / gpus
    hessians = 2 * moments * SINGLE * others
    return {
        "read": shape.held(gpus) * HALF / HOST + from_disk,
        "forward and token weights": (counts["forward"] + counts["sensitivity"]) / PRODUCTS / gpus,
        "Hessians": (counts["hessian of dense layers"] + counts["hessian of experts"]) / PRODUCTS / gpus,
        "drift": counts["drift"] / PRODUCTS / gpus + solvers + made_up,
        "the original's inputs, to the host and back": 2 * originals * HALF / HOST,
        "factors of dense layers": counts["factor of dense layers"] * inverses,
        "rounding of dense layers": rounding + _columns(shape.dense) + _turns(shape),
        "experts": own * expert,
        "experts' weights, dequantized for each batch": dequantized,
        "links": (hessians + changes + tokens + shape.weights * others) / link,  # codes travel as bytes
    }


def gigabytes(shape: Shape, gpus: int) -> dict[str, float]:
    """At most in the memory of one GPU."""
    widest = max(k for k, _ in (*shape.dense, *shape.expert))
    levels = max(1, math.log2(max(1, TOKENS / BATCH / gpus))) + 1
    own = TOKENS / gpus
    layer = max(max(k, n) for k, n in shape.dense)
    routed = TOKENS * shape.chosen / shape.experts if shape.experts else 0
    sizes = {
        "the block, 16 bits": shape.held(gpus) * HALF,
        "its codes, as bytes and packed": shape.weights * (1.5 if gpus == 1 or not shape.experts else 0.5),
        "batches that wait": own * (5 * shape.hidden + layer) * HALF,
        "Hessian, its sums and factor": widest**2 * SINGLE * (levels / 2 + 5),
        "experts' inputs of a round": 2 * PER_ROUND * routed * shape.hidden * HALF if gpus > 1 else 0,
        "experts' codes of a round, as bytes": PER_ROUND * gpus * _size(shape.expert) if gpus > 1 else 0,
    }
    return {name: size / 1e9 for name, size in sizes.items()}


def measured_rates(path: Path) -> dict[str, float]:
    """Gflop/s of the phases of a measured block of SmolLM2-135M."""
    found = json.loads(path.read_text())
    counts = work(_llama("", 1, 576, 1536, 192), found["tokens"])
    laps = found["phases"][-1]
    pairs = {
        "forward": (counts["forward"] / 2, "forward"),  # one pass: from before drift was corrected
        "sensitivity": (counts["sensitivity"], "sensitivity"),
        "hessian": (counts["hessian of dense layers"], "hessian"),
        "factor, float64": (counts["factor of dense layers"], "factor"),
    }
    return {name: count / laps[phase] / 1e9 for name, (count, phase) in pairs.items()}


def main() -> None:
    """Write the JSON and print the table."""
    target = Path(sys.argv[1])
    rows: list[dict[str, Any]] = []
    for shape in SHAPES:
        for gpus in GPUS:
            parts, memory = seconds(shape, gpus), gigabytes(shape, gpus)
            block = sum(parts.values())
            rows.append(
                {"model": shape.name, "gpus": gpus, "seconds_per_block": block, "hours": block * shape.blocks / 3600,
                 "memory_gb": sum(memory.values()), "seconds": parts, "gb": memory}
            )  # fmt: skip
    rates = {"products": PRODUCTS, "float32": SINGLES, "seconds_per_column": COLUMN, "nvlink": NVLINK}
    rates |= {"network": NETWORK, "host": HOST, "disk": DISK}
    measured = measured_rates(Path(__file__).parent / "quantize-cpu-avx2-default.json")
    facts = {"is": "a model, not a measurement", "calibration_tokens": TOKENS, "rates": rates}
    facts |= {"rates_of_the_measured_block_gflops": measured, "shapes": [asdict(shape) for shape in SHAPES]}
    target.write_text(json.dumps({**facts, "rows": rows}, indent=1) + "\n")
    print("| model | GPUs | seconds per block | of which read, links | hours | GB per GPU |\n|---|---|---|---|---|---|")
    for row in rows:
        apart = row["seconds"]["read"] + row["seconds"]["links"]
        print(
            f"| {row['model']} | {row['gpus']} | {row['seconds_per_block']:.1f} | {apart:.1f} | {row['hours']:.2f} "
            f"| {row['memory_gb']:.0f} |"
        )


if __name__ == "__main__":
    main()
