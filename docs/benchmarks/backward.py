"""Time and memory of the gradient with respect to x of a 4-bit layer on a CPU, beside what it is compared with.

    python docs/benchmarks/backward.py [--shape NxK ...] [--threads N] [--seconds S] [--json FILE]

Candidates take turns, and the fastest of the rounds is printed, because other work of a shared machine only ever adds.
What FILE holds from earlier runs counts as earlier rounds.
Memory is what the process's peak grows by during one call, the result of that call included.
"""

from __future__ import annotations

import argparse
import ctypes
import itertools
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from gptq_backend.bench import DTYPES, Candidate, Problem, Weight, describe_machine, interleave, products
from gptq_backend.locks import write_text

SHAPES = ["576x576", "1536x576", "2048x2048", "5632x2048"]  # N, K
ROWS = [1, 16, 256, 2048]
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", nargs="+", default=SHAPES, metavar="NxK")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=0.3, help="per candidate")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    rows = {}
    if arguments.json and arguments.json.exists():
        rows = {key(row): row for row in json.loads(arguments.json.read_text())["rows"]}
    for shape, dtype, count in itertools.product(arguments.shape, ("bf16", "fp32"), ROWS):
        outputs, inputs = map(int, shape.split("x"))
        row = measure(outputs, inputs, dtype, count, arguments.seconds)
        for name, time in rows.get(key(row), row)["us"].items():
            row["us"][name] = min(time, row["us"][name])
        rows[key(row)] = row
        print(line(row), flush=True)
    if arguments.json:
        command = f"python docs/benchmarks/backward.py --threads {arguments.threads} --seconds {arguments.seconds}"
        machine = describe_machine(CPU, command)
        write_text(arguments.json, json.dumps({"machine": machine, "rows": [*rows.values()]}, indent=2) + "\n")


def key(row: dict[str, Any]) -> tuple[Any, ...]:
    """What was measured."""
    return tuple(row[name] for name in ("N", "K", "dtype", "M"))


def measure(outputs: int, inputs: int, dtype: str, count: int, seconds: float) -> dict[str, Any]:
    """One shape and number of rows: microseconds of a call, and bytes."""
    weight = Weight.random(Problem(N=outputs, K=inputs, dtype=dtype), CPU, copies=1)
    served = products.layer(weight, "cpu").prepared
    assert served is not None
    layout = served.kernel.layout.arguments(served.spec, served.tensors)
    x, grad = torch.randn(count, inputs).to(DTYPES[dtype]), torch.randn(count, outputs).to(DTYPES[dtype])
    dense = served.dequantize(DTYPES[dtype])
    gradient, dequantize = torch.ops.gptq_backend.cpu_gradient, torch.ops.gptq_backend.cpu_dequantize
    calls: dict[str, Callable[[], object]] = {
        "forward": lambda: served.multiply(x),
        "backward": lambda: gradient(grad, *layout),
        "dequantized": lambda: grad @ dequantize(*layout, grad.dtype).t(),
        "dense": lambda: grad @ dense,
    }
    with torch.no_grad():
        candidates = [Candidate(name, [call]) for name, call in calls.items()]
        interleave(candidates, seconds, CPU)
        memory = {name: grown_by(call) for name, call in calls.items()}
    times = {one.name: min(one.samples) * 1e6 for one in candidates}
    return {"N": outputs, "K": inputs, "M": count, "dtype": dtype, "us": times, "bytes": memory}


def grown_by(call: Callable[[], object]) -> int:
    """Bytes that the peak of this process's memory grows by during a call."""
    ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would be used again
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _peak()
    call()
    return _peak() - before


def _peak() -> int:
    status = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in status if line.startswith("VmHWM")).split()[1]) * 1024


def line(row: dict[str, Any]) -> str:
    """A row of the table in docs/kernels.md."""
    times = " | ".join(f"{time:,.0f}" for time in row["us"].values())
    memory = " | ".join(f"{row['bytes'][name] / 2**20:.1f}" for name in ("backward", "dequantized"))
    return f"| {row['N']}x{row['K']} | {row['dtype']} | {row['M']} | {times} | {memory} |"


if __name__ == "__main__":
    main()
