"""Times of every way to multiply by the CUDA kernels, from which the table in kernels/cuda/plan.py is to be written.

python docs/benchmarks/launch_plans.py OUT.json
"""

from __future__ import annotations

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


def main(target: str) -> None:
    """Measure all, print the fastest of each, write the JSON."""
    device, rows = torch.device("cuda", 0), []
    for (n, k), count in itertools.product(SHAPES, ROWS):
        rows.append(measure(Problem(n, k, dtype="fp16"), count, device))
        best, us = next(iter(rows[-1]["us"].items()))
        chosen = rows[-1]["us"].get(rows[-1]["chosen"], float("nan"))
        print(f"{n}x{k} M={count:<4} {us:8.1f} us  {best:<60} chosen: {chosen / us:.2f}x that")
    result = {"machine": describe_machine(device, f"python docs/benchmarks/launch_plans.py {target}"), "rows": rows}
    write_text(Path(target), json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
