"""What a benchmark's result says of the machine and of the command that made it."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable
from typing import Any

import torch
from rich.console import Console

from gptq_backend.bench import machine


def command() -> str:
    """What the user typed."""
    return shlex.join(["gptq-backend", *sys.argv[1:]])


def measure_machine(device: torch.device, console: Console, say: Callable[[str], None]) -> dict[str, Any]:
    """``machine`` and ``ceilings`` of a result, which it says, too."""
    described = machine.describe_machine(device, command())
    with console.status("ceilings", spinner="line"):
        ceilings = machine.measure_ceilings(device)
    name = described["accelerator"] or f"{described['cpu']}, {described['threads']} threads"
    one = ceilings.get("read_gbps_1_thread")
    say(f"{name}; torch {described['torch']}, gptq_backend {described['gptq_backend']}")
    say(
        f"reads {ceilings['read_gbps']:.1f} GB/s{f' (1 thread {one:.1f})' if one else ''}, "
        f"multiplies {ceilings['peak_gflops']:.0f} GFLOP/s ({ceilings['peak_from']})"
    )
    return {"machine": described, "ceilings": ceilings}
