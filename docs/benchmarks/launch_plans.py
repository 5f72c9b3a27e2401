"""Times of every way to multiply by the CUDA kernels, from which the table in kernels/cuda/plan.py is to be written.

python docs/benchmarks/launch_plans.py OUT.json

OUT.json is written after each row. With - in its place, each row goes to stdout as a line of JSON, and nothing else.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_backend import QuantLinear
from gptq_backend.bench import DTYPES, Candidate, Problem, Weight, describe_machine, interleave, products, quartiles
from gptq_backend.kernels.cuda import operators as cuda
from gptq_backend.kernels.cuda.plan import Plan, machine, plan
from gptq_backend.locks import write_text

SHAPES = [(1024, 4096), (4096, 4096), (22016, 4096), (4096, 11008), (8192, 8192)]
ROWS = [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]


def choices(rows: int, tiles: int) -> list[Plan | None]:
    """Plans worth trying for so many rows; None is the way through the dense weight."""
    found: list[Plan | None] = [None]
    if rows <= 64:
        shapes = ((1, 1), (2, 1), (2, 2))
        found += [Plan(strips, tokens, warps) for (strips, tokens), warps in itertools.product(shapes, (2, 4, 8))]
        found.append(Plan(1, 1, 16))  # the others would want more registers than there are
    splits = [count for count in (1, 2, 3, 4, 6, 8, 12, 16) if count <= max(1, tiles // 4)]
    return found + [Plan(0, tokens, splits=count) for tokens, count in itertools.product((2, 4, 8), splits)]


def with_plan(how: Plan | None, layer: QuantLinear, x: Tensor) -> Tensor:
    """``layer(x)`` by that plan."""
    weight = layer.prepared
    assert weight is not None
    fields = cuda.WeightFields(*cuda.KERNEL.layout.arguments(weight.spec, weight.tensors))
    return cuda.planned_gemm(x, fields, None, how)


def measure(problem: Problem, rows: int, device: torch.device, seconds: float = 0.01) -> dict[str, Any]:
    """Microseconds by plan, fastest first, and what ``plan`` chooses."""
    weight = Weight.random(problem, device)
    rotation = products.ours(weight, "cuda")
    if rotation.reason:
        raise SystemExit(rotation.reason)
    x = torch.randn((rows, problem.K), device=device).to(DTYPES[problem.dtype])
    tiles = -(-problem.K // 64)
    candidates = [
        Candidate(str(how), [functools.partial(with_plan, how, layer, x) for layer in rotation.products])  # type: ignore[arg-type]
        for how in choices(rows, tiles)
    ]
    interleave(candidates, seconds, device)
    times = {one.name: quartiles(one.samples)[1] * 1e6 for one in candidates if one.reason is None}
    return {
        **dataclasses.asdict(problem),
        "M": rows,
        "chosen": str(plan(rows, problem.N, tiles, problem.bits, *machine(device))),
        "us": dict(sorted(times.items(), key=lambda item: item[1])),
        "failed": {one.name: one.reason for one in candidates if one.reason is not None},
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
