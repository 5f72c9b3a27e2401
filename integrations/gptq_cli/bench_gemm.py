"""The work of ``gptq-backend bench gemm``: from its options to problems, and from rows to lines."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from rich.console import Console

from gptq_backend import ConfigError
from gptq_backend.bench import DTYPES, Problem, Row, gemm, machine

from .bench_machine import measure_machine
from .model_shapes import LAYERS

_DEFAULT_SHAPES = [(4096, 4096), (11008, 4096), (4096, 11008)]


def problems(
    shapes: list[tuple[int, int]], bits: str, group_size: str, dtype: str, sym: bool, act_order: bool
) -> list[Problem]:
    """All combinations of the options' values, which are lists with commas; ConfigError for one that is not allowed."""
    if not set(dtype.split(",")) <= set(DTYPES):
        raise ConfigError(f"--dtype {dtype}: expected {', '.join(DTYPES)}, separated by commas")
    return [
        Problem(n, k, b, k if g == -1 else min(g, k), sym, act_order, d)
        for (n, k), b, g, d in itertools.product(
            shapes, numbers("--bits", bits, (2, 3, 4, 8)), numbers("--group-size", group_size), dtype.split(",")
        )
    ]


def read_shapes(texts: Sequence[str], lists: Sequence[str]) -> list[tuple[int, int]]:
    """[N, K] of ``--shape NxK`` and of the models in ``--shapes``; ConfigError for what is neither."""
    found = []
    for text in texts:
        n, _, k = text.lower().partition("x")
        if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
            raise ConfigError(f"--shape {text} is not NxK, e.g. 11008x4096 for 4096 input features")
        found.append((int(n), int(k)))
    for name in lists:
        if name != "all" and name not in LAYERS:
            raise ConfigError(f"--shapes {name} is not known; choose all or one of {list(LAYERS)}")
        found += itertools.chain(*LAYERS.values()) if name == "all" else LAYERS[name]
    return list(dict.fromkeys(found)) or _DEFAULT_SHAPES


def numbers(option: str, text: str, allowed: Sequence[int] = ()) -> list[int]:
    """The numbers in ``text``, with commas between them; ConfigError for one that is not ``allowed``.

    Without ``allowed``, all positive ones are, and -1 for ``--group-size``.
    """
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = [0]
    wrong = [number for number in found if (number not in allowed if allowed else number < 1)]
    if wrong and not (option == "--group-size" and set(wrong) == {-1}):
        raise ConfigError(f"{option} {text}: expected {allowed or 'positive numbers'}, separated by commas")
    return found


def run(
    asked: Sequence[Problem],
    tokens: Sequence[int],
    device: torch.device,
    console: Console,
    say: Callable[[str], None],
    **options: Any,
) -> dict[str, Any]:
    """Measure all problems, and ``say`` the rows of each as they come -> ``machine``, ``ceilings`` and ``rows``."""
    result, rows = measure_machine(device, console, say), []
    for problem in asked:
        say(_heading(problem))
        done = gemm.run(problem, tokens, result["ceilings"], device, **options)
        for count in tokens:
            with console.status(f"{problem.N}x{problem.K}, M={count}", spinner="line"):
                found = next(done)
            rows += found
            say("\n".join(map(_line, found)))
    after = max(machine.read_gbps(device).values())
    result["ceilings"]["read_gbps_after"] = after
    say(f"\nreads {after:.1f} GB/s after all that")
    return {**result, "rows": [dataclasses.asdict(row) for row in rows]}


def _heading(problem: Problem) -> str:
    grid = ("sym" if problem.sym else "asym") + (", act-order" if problem.act_order else "")
    title = f"\n{problem.N}x{problem.K}, {problem.bits} bits, group {problem.group_size}, {grid}, {problem.dtype}\n"
    return title + f"{'M':>5}  {'kernel':<28}{'us':>10}{'+-':>6}{'GB/s':>8}{'roof':>7}{'x linear':>10}{'error':>10}"


def _line(row: Row) -> str:
    start = f"{row.M:>5}  {row.kernel:<28}"
    if row.us is None or row.spread is None:
        return f"{start}  {row.reason}"
    half = (row.spread[1] - row.spread[0]) / 2 / row.us
    ratio = "" if row.ratio_bf16 is None else f"{row.ratio_bf16:.2f}"
    error = "" if row.error is None else f"{row.error:.1e}"
    return f"{start}{row.us:>10.1f}{half:>6.0%}{row.gbps:>8.2f}{row.roof_share:>7.0%}{ratio:>10}{error:>10}"
