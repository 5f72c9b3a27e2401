"""Times of every way to multiply by the CUDA kernels, from which the table in kernels/cuda/plan.py is to be written.

python docs/benchmarks/launch_plans.py OUT.json

OUT.json is written after each row. With - in its place, each row goes to stdout as a line of JSON, and nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch

from gptq_backend import ConfigError
from gptq_backend.bench import Problem, describe_machine, plans
from gptq_backend.kernels.cuda.plan import candidates, gpu, plan
from gptq_backend.locks import write_text

SHAPES = [(1024, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (8192, 8192)]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def measure(problem: Problem, rows: int, device: torch.device, seconds: float = 0.01) -> dict[str, Any]:
    """Microseconds by plan, fastest first, and what ``plan`` chooses."""
    try:
        layer = plans.Layer.random(problem, device)
    except ConfigError as error:
        raise SystemExit(str(error)) from None
    sizes = (layer.shape.tiles, problem.bits, gpu(device).shared_bytes)
    times, failed = layer.seconds(rows, seconds, candidates(rows, *sizes))
    return {
        **dataclasses.asdict(problem),
        "M": rows,
        "chosen": str(plan(rows, problem.N, layer.shape.tiles, problem.bits, gpu(device))),
        "us": {str(how): time * 1e6 for how, time in sorted(times.items(), key=lambda item: item[1])},
        "failed": {str(how): reason for how, reason in failed.items()},
    }


def line(row: dict[str, Any]) -> str:
    """For people: the fastest plan, and how much slower the chosen one is."""
    best, us = next(iter(row["us"].items()))
    chosen = row["us"].get(row["chosen"], float("nan"))
    return f"{row['N']}x{row['K']} M={row['M']:<4} {us:8.1f} us  {best:<60} chosen: {chosen / us:.2f}x that"


def main(arguments: list[str]) -> None:
    """Measure, print the fastest of each, write the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target")
    parser.add_argument("--shape", action="append", help="NxK (repeatable)")
    parser.add_argument("--m", default=",".join(map(str, ROWS)))
    asked = parser.parse_args(arguments)
    shapes = [(int(n), int(k)) for n, k in (text.split("x") for text in asked.shape or ())] or SHAPES
    device, rows = torch.device("cuda", 0), []
    command = "python docs/benchmarks/launch_plans.py " + " ".join(arguments)
    described = describe_machine(device, command)
    for (n, k), count in itertools.product(shapes, map(int, asked.m.split(","))):
        rows.append(measure(Problem(n, k, dtype="fp16"), count, device))
        if asked.target == "-":
            print(json.dumps(rows[-1]), flush=True)
        else:
            print(line(rows[-1]))
            write_text(Path(asked.target), json.dumps({"machine": described, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
