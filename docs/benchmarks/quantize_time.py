"""Seconds of quantizing blocks by quality, with float32 products by oneDNN and by torch's default, in turns.

    python docs/benchmarks/quantize_time.py --json docs/benchmarks/quantize-cpu-avx512.json

Blocks of SmolLM2-135M's shape with random weights, 64 x 512 random tokens. The first block is left out: it holds what
is done once.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from gptq_backend import QuantizeConfig, float32_products
from gptq_backend.bench import machine, threads
from gptq_cli.bench_quantize import run

VARIANTS: dict[str, dict[str, Any]] = {
    "fast": {"quality": "fast"},
    "default without drift": {"correct_drift": False},
    "default without row feedback": {"row_feedback": False},
    "default": {},
}
CPU = torch.device("cpu")


def block_seconds(settings: dict[str, Any], fast: bool, blocks: int) -> dict[str, float]:
    """Of a later block, by phase."""
    with ExitStack() as stack:
        if not fast:
            stack.enter_context(patch.object(float32_products._users, "exact", False))
        result = run("smollm2-135m", QuantizeConfig(group_size=64, **settings), blocks, 64, 512, CPU, "fp32")
    _, _, *later = result.phases
    return {name: sum(lap.get(name, 0) for lap in later) / len(later) for name in later[0]}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", type=int, default=3)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    rows = []
    with threads(asked.threads):
        described = machine.describe_machine(
            CPU, " ".join(["python", "docs/benchmarks/quantize_time.py", *sys.argv[1:]])
        )
        for turn in range(asked.turns):
            for name, settings in VARIANTS.items():
                for fast in (True, False):
                    phases = block_seconds(settings, fast, asked.blocks)
                    rows.append({"turn": turn, "variant": name, "onednn": fast, "phases": phases})
                    rows[-1]["seconds"] = sum(phases.values())
                    print(json.dumps(rows[-1]), flush=True)
    medians = {
        f"{name}, {'oneDNN' if fast else 'torch alone'}": statistics.median(
            row["seconds"] for row in rows if row["variant"] == name and row["onednn"] == fast
        )
        for name in VARIANTS
        for fast in (True, False)
    }
    found = {
        "machine": described,
        "used_on_this_cpu": float32_products._users.exact,
        "median_seconds_of_a_block": medians,
        "rows": rows,
    }
    asked.json.write_text(json.dumps(found, indent=1, default=dataclasses.asdict) + "\n")


if __name__ == "__main__":
    main()
