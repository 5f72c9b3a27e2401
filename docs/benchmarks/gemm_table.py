"""One line per file and number of rows from what ``bench gemm --json`` wrote.

python docs/benchmarks/gemm_table.py FILE.json...
"""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path
from typing import Any


def lines(name: str, rows: list[dict[str, Any]]) -> list[str]:
    """For each M the geometric mean, over the shapes, of each kernel's speed in units of ``F.linear``'s."""
    kernels = dict.fromkeys(row["kernel"] for row in rows if row["kernel"] != "F.linear")
    found = []
    for count in dict.fromkeys(row["M"] for row in rows):
        parts = []
        for kernel in kernels:
            mine = [row for row in rows if (row["M"], row["kernel"]) == (count, kernel)]
            ratios = [row["ratio_bf16"] for row in mine if row["ratio_bf16"]]
            parts.append(
                f"{kernel} {statistics.geometric_mean(ratios):.2f}" if ratios else f"{kernel}: {mine[0]['reason']}"
            )
        found.append(f"{name:<12} M={count:<5} {'   '.join(parts)}")
    return found


def main(files: list[str]) -> None:
    """Print the lines of each file that holds such rows."""
    print("speed in units of F.linear's")
    for file in files:
        rows = json.loads(Path(file).read_text(encoding="utf-8"))["rows"]
        if rows and "kernel" in rows[0]:
            print("\n".join(lines(Path(file).stem, rows)))


if __name__ == "__main__":
    main(sys.argv[1:])
