"""The work of ``gptq-backend doctor``: every kernel on every device of the machine, each in a process of its own."""

from __future__ import annotations

import json
import platform
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from gptq_backend import KERNELS, GPTQError, __version__

from . import models, terminal
from .formatting import significant
from .inspection import local_devices

PROGRAM = sys.executable, "-m", "gptq_backend.kernels.row_check"


def run(devices: Sequence[str] | None, seconds: float, json_target: str | None) -> None:
    """Check, print, and fail if a kernel is wrong.

    Raises:
        GPTQError: a kernel gave wrong results, crashed or hung.
    """
    console, say = terminal.start(json_target)
    rows: list[dict[str, Any]] = []
    for device in devices or ():
        models.require_device(device)
    for device in devices or map(str, local_devices()):
        for kernel in KERNELS:
            with console.status(f"{kernel.name} on {device}", spinner="line"):
                rows.append(examine(kernel.name, device, seconds))
    found = {"versions": versions(), "rows": rows}
    terminal.write_json(json_target, found)
    say("\n".join(lines(found)))
    if bad := [row for row in rows if row["wrong"]]:
        first = f"{bad[0]['row']} on {bad[0]['device']}: {bad[0]['wrong'][0]}"
        raise GPTQError(f"{len(bad)} kernels cannot be trusted here; the first: {first}; please report the last line")


def examine(row: str, device: str, seconds: float, program: Sequence[str] = PROGRAM) -> dict[str, Any]:
    """What became of one row on one device.

    Args:
        seconds: after which it counts as hanging.
        program: takes the row and the device, and writes what ``row_check`` writes.

    Returns:
        ``right``: how many kinds of weight; ``off``: the largest deviation of them; ``refused``: reasons, and
        ``wrong``: sentences, both without repetition; ``seconds``: for the kinds that are right.
    """
    try:
        done = subprocess.run([*program, row, device], capture_output=True, timeout=seconds)
        output, errors, code = done.stdout, done.stderr, done.returncode
    except subprocess.TimeoutExpired as late:
        output, errors, code = late.stdout or b"", late.stderr or b"", None
    kind, right, refused, ended = "the start", [], [], True
    wrong: dict[str, list[str]] = {}  # what, and of which kinds
    for line in map(json.loads, _whole_lines(output)):
        ended = "begins" not in line
        kind = line.get("begins", kind)
        if "refused" in line:
            refused.append(line["refused"])
        elif "failed" in line:
            wrong.setdefault(line["failed"], []).append(kind)
        elif line.get("right"):
            right.append(line)
        elif "off" in line:
            wrong.setdefault("wrong results", []).append(kind)
    if code is None:
        wrong.setdefault(f"it did not end within {seconds:g} s", []).append(kind)
    elif code:
        wrong.setdefault(_end(code, errors), []).append(kind)
    elif not ended:
        wrong.setdefault("it ended too early", []).append(kind)
    return {
        "row": row,
        "device": device,
        "right": len(right),
        "off": max((each["off"] for each in right), default=None),
        "seconds": sum(each["seconds"] for each in right),
        "refused": list(dict.fromkeys(refused)),
        "wrong": [f"{what} ({_of(kinds)})" for what, kinds in wrong.items()],
    }


def _of(kinds: list[str]) -> str:
    return kinds[0] if len(kinds) == 1 else f"{kinds[0]}; and {len(kinds) - 1} more"


def _whole_lines(output: bytes) -> list[str]:
    """Those of a process that may have died within one."""
    return [line for line in output.decode(errors="replace").splitlines(keepends=True) if line.endswith("\n")]


def _end(code: int, errors: bytes) -> str:
    if code < 0:
        names = {each.value: each.name for each in signal.Signals}
        return f"it crashed with {names.get(-code, f'signal {-code}')}"
    last = errors.decode(errors="replace").strip().splitlines()
    return f"it ended with exit code {code}" + (f": {last[-1]}" if last else "")


def versions() -> dict[str, str]:
    """What a bug report needs to say of the machine."""
    found = {
        "gptq-backend": __version__,
        "torch": torch.__version__,
        "Python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    if torch.version.cuda or torch.version.hip:
        found["toolkit"] = f"CUDA {torch.version.cuda}" if torch.version.cuda else f"ROCm {torch.version.hip}"
    for index in range(torch.cuda.device_count()):
        major, minor = torch.cuda.get_device_capability(index)
        found[f"cuda:{index}"] = f"{torch.cuda.get_device_name(index)} ({major}.{minor})"
    return found


def lines(found: Mapping[str, Any]) -> Iterator[str]:
    """A table for people, then one line for a bug report."""
    width = max(len(row["row"]) for row in found["rows"])
    yield f"{'kernel':<{width}}  device    kinds   most off  seconds  what else"
    for row in found["rows"]:
        rest = "; ".join([*row["wrong"], *row["refused"]])
        yield (
            f"{row['row']:<{width}}  {row['device']:<8}  {row['right']:>5}  {significant(row['off']):>9}  "
            f"{row['seconds']:>7.2f}  {rest}"
        ).rstrip()
    yield "kinds: of weights that gave right results. most off: against plain torch, in units of a usual result."
    yield ""
    parts = [f"{name} {version}" for name, version in found["versions"].items()]
    for row in found["rows"]:
        state = "; ".join(row["wrong"]) or (f"{row['right']} right" if row["right"] else "refused")
        parts.append(f"{row['row']} on {row['device']}: {state}")
    yield "report: " + ", ".join(parts)
