"""One process with several threads beside as many ranks with one thread each: time and memory, in turns.

    python docs/benchmarks/ranks.py --shape smollm2-135m --ranks 2 --turns 3 --json docs/benchmarks/ranks-cpu.json

Each turn runs ``gptq-backend bench quantize`` once in each way, in new processes: blocks of the shape with random
weights on random tokens. The first block is left out of the seconds: it holds what is done once. CPU seconds, of all
threads and blocks, tell what it would be like where nobody else uses the machine: a process with n threads takes at
least an n-th of its own, ranks about as long as the one with most.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any


def one_run(arguments: list[str], ranks: int, threads: int) -> dict[str, Any]:
    """The JSON of ``bench quantize``."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        command = [sys.executable, "-m", "gptq_cli", "bench", "quantize", *arguments]
        command += ["--ranks", str(ranks), "--threads", str(threads), "--json", str(target)]
        # Threads that spin while they wait take the cores from those that work, if others use the machine, too.
        environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=environment)
        return json.loads(target.read_text())


def row(result: dict[str, Any], ranks: int, threads: int) -> dict[str, Any]:
    """What is kept of a run."""
    _, _, *later = result["phases"]
    phases = {name: sum(lap.get(name, 0) for lap in later) / len(later) for name in sorted({*later[0]})}
    found = {"ranks": ranks, "threads": threads, "block_seconds": sum(phases.values())}
    kept = {key: result[key] for key in ("cpu_seconds_by_rank", "peak_bytes_by_rank")}
    return {**found, **kept, "load_average": os.getloadavg()[0], "phases": phases}


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--blocks", default="2")
    parser.add_argument("--samples", default="8")
    parser.add_argument("--seqlen", default="512")
    parser.add_argument("--group-size", default="64")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    asked = parser.parse_args()
    names = ("shape", "blocks", "samples", "seqlen", "group_size")
    arguments = [part for name in names for part in (f"--{name.replace('_', '-')}", str(getattr(asked, name)))]
    rows, machine = [], {}
    for _ in range(asked.turns):
        for ranks, threads in ((1, asked.ranks), (asked.ranks, 1)):
            result = one_run(arguments, ranks, threads)
            machine = result["machine"]
            rows.append(row(result, ranks, threads))
            print(json.dumps(rows[-1]), flush=True)
    alone, together = ([each["block_seconds"] for each in rows if each["ranks"] == n] for n in (1, asked.ranks))
    longest = [max(each["cpu_seconds_by_rank"]) / each["threads"] for each in rows]
    ratios = [b / a for a, b in zip(alone, together, strict=True)]
    found = {
        "command": " ".join(["python", "docs/benchmarks/ranks.py", *sys.argv[1:]]),
        "machine": {key: value for key, value in machine.items() if key not in ("command", "threads")},
        "median_seconds_of_one_process": statistics.median(alone),
        "median_seconds_of_ranks": statistics.median(together),
        "ratio_of_each_turn": ratios,
        "ratio_of_cpu_seconds_per_thread": [b / a for a, b in zip(longest[::2], longest[1::2], strict=True)],
        "rows": rows,
    }
    asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
