"""The command line as one process, and as several ranks."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = ROOT / "tests/data/wikitext2-valid-excerpt.txt"
# Of a run in six batches.
SETTINGS = ["--calibration", TEXT, "--samples", "6", "--seqlen", "32", "--batch-size", "1", "--group-size", "32"]
SETTINGS += ["--kld-windows", "0"]


def torchrun(ranks: int) -> list[str]:
    """What comes before the name of the module."""
    there = ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "-m"]
    return ["torch.distributed.run", "--nproc-per-node", str(ranks), *there]


def environment() -> dict[str, str]:
    """Of a process with one thread that imports this tree."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "integrations"), *sys.path[1:]])
    return os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def start(*arguments: object) -> subprocess.Popen[str]:
    """``python -m`` with the arguments."""
    command = [sys.executable, "-m", *map(str, arguments)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(command, text=True, env=environment(), **pipes)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same, to its end."""
    process = start(*arguments)
    try:
        out, err = process.communicate(timeout=300)
    finally:
        process.kill()
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)
