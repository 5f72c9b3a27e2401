"""Times the product with a dense head against torch's, in turns, and checks both against float64.

python docs/benchmarks/dense_product.py docs/benchmarks/dense-product-cpu-avx512.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from gptq_backend.bench import describe_machine, machine
from gptq_backend.kernels.cpu_dense import Dense, Product

SHAPES = (49152, 576), (32000, 2048)  # outputs and inputs of the heads of SmolLM2-135M and TinyLlama
ROUNDS = 15


def seconds(functions: dict[str, Callable[[], Tensor]]) -> dict[str, float]:
    """Medians of rounds in turns."""
    found: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(ROUNDS):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            found[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in found.items()}


def row(outputs: int, inputs: int, dtype: torch.dtype, rows: int) -> dict[str, object]:
    weight, x = torch.randn(outputs, inputs).to(dtype), torch.randn(rows, inputs).to(dtype)
    product = Product(Dense(weight))
    functions = {"ours": lambda: product(x), "torch": lambda: torch.nn.functional.linear(x, weight)}
    exact = x.double() @ weight.double().t()
    errors = {name: float((function() - exact).norm() / exact.norm()) for name, function in functions.items()}
    times = seconds(functions)
    return {
        "outputs": outputs,
        "inputs": inputs,
        "dtype": str(dtype).removeprefix("torch."),
        "rows": rows,
        "seconds": times,
        "error": errors,
        "ours_gbps": weight.nbytes / times["ours"] / 1e9,
        "torch_over_ours": times["torch"] / times["ours"],
    }


def main(target: str) -> None:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    found = [
        row(*shape, dtype, rows)
        for shape in SHAPES
        for dtype in (torch.bfloat16, torch.float16, torch.float32)
        for rows in (1, 2, 4, 8)
    ]
    for each in found:
        print({key: value for key, value in each.items() if key not in ("seconds", "error")})
    device = torch.device("cpu")
    described = describe_machine(device, f"docs/benchmarks/dense_product.py {target}")
    result = {"machine": described, "read_gbps": machine.read_gbps(device), "rows": found}
    Path(target).write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1])
