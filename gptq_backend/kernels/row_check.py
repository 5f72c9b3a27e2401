"""Checks one row of the kernel table on one device, kind by kind of weight: the program that ``doctor`` runs, because
a kernel may end its process or never come back.

    python -m gptq_backend.kernels.row_check ROW DEVICE

One line of JSON for each step, written at once.
"""

from __future__ import annotations

import itertools
import json
import sys
import time
from collections.abc import Iterator

import torch

from ..format.weight import WeightSpec
from . import self_check
from .interface import Kernel
from .table import KERNELS, expert_kernel


def kinds() -> Iterator[tuple[str, WeightSpec]]:
    """What is checked: a name and a weight of it."""
    for bits, sym, act_order in itertools.product((2, 3, 4, 8), (True, False), (False, True)):
        zeros, order = "symmetric" if sym else "asymmetric", ", act-order" if act_order else ""
        yield f"{bits} bits, {zeros}{order}", WeightSpec(1024, 512, bits, 64, 16, sym, act_order)


def check(kernel: Kernel, device: torch.device) -> Iterator[dict[str, object]]:
    """For each kind first ``{"begins": name}``; then why it is refused, what it failed with, or how far it is off."""
    for name, spec in kinds():
        yield {"begins": name}
        start = time.perf_counter()
        try:
            weight = self_check.problem(spec, device)
            if (reason := kernel.supports(weight.spec, device)) is not None:
                yield {"refused": reason}
                continue
            off = [found for *_, found in self_check.deviations(kernel, weight, expert_kernel(kernel))]
        except Exception as error:
            yield {"failed": self_check.describe(error)}
            continue
        right = all(found <= self_check.limit(kernel) for found in off)
        worst = max(off) if all(found == found for found in off) else None  # JSON knows no NaN
        yield {"right": right, "off": worst, "seconds": time.perf_counter() - start}


def main(arguments: list[str]) -> None:
    row, device = arguments
    kernel = next(each for each in KERNELS if each.name == row)
    for line in check(kernel, torch.device(device)):
        print(json.dumps(line), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
