"""Causal attention of a prompt: ours beside torch's, in turns, with the error of both against float64.

python docs/benchmarks/prompt_attention.py --threads 2 --json docs/benchmarks/prompt-attention-cpu-avx512.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_backend.bench import machine, threads
from gptq_backend.kernels import cpu_attention

SHAPES = [(1, 128, 9, 3, 64), (8, 128, 9, 3, 64), (1, 512, 9, 3, 64), (1, 128, 32, 4, 64), (1, 512, 32, 8, 128),
          (1, 2048, 32, 8, 128)]  # fmt: skip
NAMES = ("batch", "rows", "heads", "kv_heads", "head_dim")
CPU = torch.device("cpu")


def milliseconds(call: Callable[[], Tensor]) -> float:
    """Of one call."""
    start = time.perf_counter()
    call()
    return (time.perf_counter() - start) * 1e3


def error(found: Tensor, expected: Tensor) -> float:
    """As a share of the norm."""
    return float((found.double() - expected).norm() / expected.norm())


def row(shape: tuple[int, ...], dtype: torch.dtype, turns: int) -> dict[str, Any]:
    """One shape; keys and values as a cache holds them."""
    batch, rows, heads, kv_heads, head_dim = shape
    q = torch.randn(batch, rows, heads, head_dim).to(dtype)
    k, v = torch.randn(2, batch, kv_heads, rows, head_dim).to(dtype)

    def ours() -> Tensor:
        return cpu_attention.attend(q, k, v, None, head_dim**-0.5)

    def torchs(q: Tensor = q, k: Tensor = k, v: Tensor = v) -> Tensor:
        y = torch.nn.functional.scaled_dot_product_attention(q.transpose(1, 2), k, v, is_causal=True, enable_gqa=True)
        return y.transpose(1, 2).flatten(2).contiguous()

    exact = torchs(q.double(), k.double(), v.double())
    times: dict[str, list[float]] = {"ours": [], "torch": []}
    for turn in range(turns + 1):
        for name, call in (("ours", ours), ("torch", torchs)):
            took = milliseconds(call)
            times[name] += [took] * (turn > 0)  # the first warms up
    medians = {f"{name}_ms": statistics.median(each) for name, each in times.items()}
    errors = {"ours_error": error(ours(), exact), "torch_error": error(torchs(), exact)}
    ratio = statistics.median(b / a for a, b in zip(times["ours"], times["torch"]))
    sizes = dict(zip(NAMES, shape, strict=True))
    return {**sizes, "dtype": str(dtype).removeprefix("torch."), **medians, "torch_over_ours": ratio, **errors}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--turns", type=int, default=15)
    parser.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    torch.manual_seed(0)
    rows = []
    with threads(asked.threads):
        command = " ".join(["python", "docs/benchmarks/prompt_attention.py", *sys.argv[1:]])
        described = machine.describe_machine(CPU, command)
        for shape in SHAPES:
            for dtype in (torch.bfloat16, torch.float32):
                rows.append(row(shape, dtype, asked.turns))
                print(json.dumps(rows[-1]), flush=True)
    asked.json.write_text(json.dumps({"machine": described, "threads": asked.threads, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
