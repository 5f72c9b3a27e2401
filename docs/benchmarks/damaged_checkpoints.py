"""What readers make of many damaged checkpoints: loaded, refused in one sentence, or anything worse.

    python docs/benchmarks/damaged_checkpoints.py OUT.json [--count 3000] [--first 1000]

From the root of the repository. Each case is a peer's tiny checkpoint with one damage of
tests/transformers/mutations.py, read by ``from_quantized`` and as ``inspect`` does. What is worse than a sentence is
listed in the output with its seed.
"""

from __future__ import annotations

import json
import resource
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer

sys.path.insert(0, str(Path(__file__).parents[2]))

from gptq_backend import GPTQError, __version__
from gptq_cli.checkpoint import read_checkpoint
from gptq_transformers import from_quantized
from tests.transformers.checkpoints import NAMES, PEERS
from tests.transformers.mutations import mutated

_SECONDS = 10.0  # of CPU: a thousand times what an intact one takes


def inspect(folder: Path) -> None:
    damaged = read_checkpoint(folder).damaged
    if damaged:
        raise GPTQError(next(iter(damaged.values())))


def load(folder: Path) -> None:
    with torch.no_grad():
        from_quantized(folder, dtype=torch.float32)(input_ids=torch.ones(1, 4, dtype=torch.long))


def verdict(read: Callable[[Path], None], folder: Path) -> tuple[str, str]:
    start = time.process_time()
    try:
        read(folder)
        found, text = "loaded", ""
    except GPTQError as error:
        text = str(error)
        found = "unclear" if "\n" in text or len(text) > 1000 else "refused"
    except Exception as error:  # what must not happen
        found, text = "unclear", f"{type(error).__name__}: {error}"[:300]
    return ("slow" if time.process_time() - start > _SECONDS else found), text


def main(
    out: Path,
    count: Annotated[int, typer.Option(help="Damaged checkpoints.")] = 3000,
    first: Annotated[int, typer.Option(help="First seed.")] = 1000,
) -> None:
    """Count what becomes of damaged checkpoints."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    counts: dict[str, Counter[str]] = {"from_quantized": Counter(), "inspect": Counter()}
    worse: list[dict[str, Any]] = []
    disagreements = 0
    for seed in range(first, first + count):
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch) / "damaged"
            what = mutated(PEERS / NAMES[seed % len(NAMES)], folder, seed)
            found = {"from_quantized": verdict(load, folder), "inspect": verdict(inspect, folder)}
        for reader, (kind, text) in found.items():
            counts[reader][kind] += 1
            if kind not in ("loaded", "refused"):
                worse.append({"seed": seed, "damage": what, "reader": reader, "verdict": kind, "text": text})
        disagreements += len({kind for kind, _ in found.values()}) > 1
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    result = {
        "command": f"python docs/benchmarks/damaged_checkpoints.py OUT.json --count {count} --first {first}",
        "gptq_backend": __version__,
        "cases": count,
        "verdicts": {reader: dict(counter) for reader, counter in counts.items()},
        "disagreements": disagreements,
        "worse": worse,
        "peak_memory_mib": peak >> 10,
    }
    out.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in result.items() if key != "worse"}, indent=1), worse[:5])


if __name__ == "__main__":
    typer.run(main)
