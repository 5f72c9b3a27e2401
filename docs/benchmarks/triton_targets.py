"""What becomes of the Triton kernels on AMD GPUs that are not here: registers, spills, matrix instructions.

    python docs/benchmarks/triton_targets.py docs/benchmarks/triton-amd.json

Compiles what would be launched for the rows of every tile and for experts, with act-order and zero points, which take
the most registers. Needs no GPU. Prints a table.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[2]))
from gptq_backend.kernels import Routing
from gptq_backend.kernels.triton import operators, plan
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import prepared
from tests.kernels.test_experts import arguments, stacked
from tests.kernels.triton_compiler import Compiler

TARGETS = ("gfx942", "gfx1100", "gfx1201")
COUNTS = {
    "registers": "vgpr_count",
    "spilled vector registers": "vgpr_spill_count",
    "spilled scalar registers": "sgpr_spill_count",
    "bytes of private memory": "private_segment_fixed_size",
    "bytes of shared memory": "group_segment_fixed_size",
}


def facts(compiled: Any) -> dict[str, int]:
    """Of AMD's assembly."""
    text = compiled.asm["amdgcn"]
    found = {name: int(re.findall(rf"\.{key}: +(\d+)", text)[-1]) for name, key in COUNTS.items()}
    found["bytes of shared memory"] = compiled.metadata.shared
    found["matrix instructions"] = len(re.findall(r"^\s*v_(?:mfma|wmma)\S+", text, re.MULTILINE))
    found["instructions"] = len(re.findall(r"^\s+(?:[vs]|ds|global|buffer|flat)_\w+", text, re.MULTILINE))
    return found


def compiled_for(target: str, bits: int) -> Iterator[dict[str, Any]]:
    """One row for each kernel."""
    heuristics = plan.HEURISTICS["gfx942" if target == "gfx942" else "gfx1100"]
    machine = plan.Machine(heuristics, 304, 64 << 10)  # multiprocessors of an MI300X
    plan.machine = lambda device: machine
    plan.plan.cache_clear()
    plan.fitting_tiles.cache_clear()
    for tile in heuristics.tiles:
        compiler = Compiler(target)
        operators._kernels = lambda compiler=compiler: compiler
        served = prepared(random_weight(bits, 1024, 256, 128, act_order=True), operators.KERNEL)
        served.multiply(torch.empty(tile.rows, 1024, dtype=torch.bfloat16), torch.empty(256, dtype=torch.bfloat16))
        name = "gemv" if tile.rows == 1 else "gemm"
        yield {"target": target, "bits": bits, "kernel": name, "rows": tile.rows, **facts(compiler.compiled[name])}
    compiler = Compiler(target)
    operators._kernels = lambda: compiler
    each, stack = stacked(operators.KERNEL, [random_weight(bits, 1024, 256, 128, i, act_order=True) for i in range(2)])
    x = torch.empty(2, 1024, dtype=torch.bfloat16)
    operators.EXPERTS.gemm(x, arguments(each, stack), Routing(torch.tensor([[0, 1], [1, 0]]), 2), 2, None)
    yield {"target": target, "bits": bits, "kernel": "experts", "rows": 16, **facts(compiler.compiled["gemm"])}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("json", type=Path)
    where = parser.parse_args().json
    rows = []
    for target in TARGETS:
        for bits in (2, 3, 4, 8):
            for row in compiled_for(target, bits):
                print("| " + " | ".join(str(value) for value in row.values()) + " |", flush=True)
                rows.append(row)
                report = {"triton": triton.__version__, "dtype": "bfloat16", "kernels": rows}
                where.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
