"""The work of ``gptq-backend tune``: which layers, and what is printed of them."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

from gptq_backend import KERNELS, GPTQError
from gptq_backend.bench import Problem, plans

from . import bench_gemm, terminal
from .checkpoint import Layer, read_checkpoint

# Layers with the same input, which vLLM multiplies by as one.
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))

# Choices, fewer than were asked for if that failed, and why it failed or was left out.
Measured = tuple[Sequence[plans.Choice], str | None]


def run(
    model: str | None,
    shapes: Sequence[str],
    lists: Sequence[str],
    bits: str,
    group_size: str,
    m: str,
    seconds: float,
    device_name: str,
    json_target: str | None,
) -> None:
    """Measure, print, and keep what was found.

    Raises:
        GPTQError: there is no such GPU, the kernels do not serve it, or an option is wrong.
    """
    console, say = terminal.start(json_target)
    rows = sorted(set(bench_gemm.numbers("--m", m)))
    wanted: list[Problem] = []
    if model is not None:
        checkpoint = read_checkpoint(model)
        wanted += layers(layer for layer in checkpoint.layers if layer.name not in checkpoint.looked_up)
    if shapes or lists or model is None:
        pairs = bench_gemm.read_shapes(shapes, lists)
        wanted += bench_gemm.problems(pairs, bits, group_size, "fp16", sym=True, act_order=False)
    device = require_gpu(device_name, wanted)
    done: set[tuple[int, ...]] = set()

    def measure(problem: Problem) -> Measured:
        with console.status(title(problem), spinner="line"):
            return tune(problem, rows, device, seconds, done)

    found, refused = tune_all(wanted, measure, say)
    path = plans.table_path(device)
    say(f"kept in {path}")
    result = {"device": torch.cuda.get_device_name(device), "file": str(path), "rows": found, "refused": refused}
    terminal.write_json(json_target, result)


def tune_all(
    wanted: Sequence[Problem], measure: Callable[[Problem], Measured], say: Callable[[str], None]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Measure each layer once -> what was found and what was refused, as JSON values.

    Raises:
        GPTQError: none could be measured.
    """
    found: list[dict[str, Any]] = []
    refused: list[dict[str, Any]] = []
    for problem in dict.fromkeys(wanted):
        choices, reason = measure(problem)
        say("\n".join([title(problem), *map(line, choices), *([f"  {reason}"] if reason else [])]))
        found += [{**dataclasses.asdict(problem), **as_json(each)} for each in choices]
        refused += [{**dataclasses.asdict(problem), "reason": reason}] if reason else []
    if not found:
        raise GPTQError(f"no layer could be measured: {refused[0]['reason']}")
    return found, refused


def tune(
    problem: Problem, rows: Sequence[int], device: torch.device, seconds: float, done: set[tuple[int, ...]]
) -> Measured:
    """Tune a layer, and add its shape to ``done``. Where it is there already, another layer has the same plans."""
    choices: list[plans.Choice] = []
    try:
        layer = plans.Layer.random(problem, device)
        if layer.shape in done:
            return [], "its plans are those of a layer above"
        done.add(layer.shape)
        choices.extend(plans.tune(layer, rows, seconds))
    except GPTQError as error:
        return choices, str(error)
    return choices, None


def title(problem: Problem) -> str:
    """One layer, for people."""
    return f"{problem.N}x{problem.K}, {problem.bits} bits, group {problem.group_size}"


def require_gpu(name: str, wanted: Sequence[Problem]) -> torch.device:
    """The device of that name.

    Raises:
        GPTQError: it is none, or the CUDA kernels do not serve it.
    """
    (kernel,) = (each for each in KERNELS if each.name == "cuda")
    try:
        device = torch.device(name)
        reason = kernel.supports(wanted[0].spec.weight, device) if wanted else "there is no quantized layer"
    except RuntimeError as error:
        device, reason = torch.device("cpu"), str(error).partition("\n")[0]
    if reason:
        raise GPTQError(f"tune measures the CUDA kernels, which do not serve --device {name} here: {reason}")
    return torch.empty(0, device=device).device  # with an index


def layers(found: Iterable[Layer]) -> list[Problem]:
    """The layers of a checkpoint, and those that are joined in vLLM. Experts are left out: Triton serves them.

    Codes have the width that they have in memory.
    """
    problems: list[Problem] = []
    parents: dict[str, dict[str, Problem]] = defaultdict(dict)
    for layer in found:
        parent, _, name = layer.name.rpartition(".")
        if "experts" in parent.split("."):
            continue
        spec = layer.spec.weight
        problem = Problem(
            spec.out_features, spec.in_features, spec.bits, spec.group_size, spec.sym, spec.act_order, dtype="fp16"
        )
        parents[parent][name] = problem
        problems.append(problem)
    for inside in parents.values():
        for names in _JOINED:
            parts = [inside[name] for name in names if name in inside]
            alike = {dataclasses.replace(part, N=0) for part in parts}
            if len(parts) == len(names) and len(alike) == 1:
                problems.append(dataclasses.replace(parts[0], N=sum(part.N for part in parts)))
    return list(dict.fromkeys(problems))


def line(choice: plans.Choice) -> str:
    """One number of rows, for people."""
    if choice.best == choice.usual:
        how = "the usual plan"
    elif choice.usual_reason == plans.WRONG:
        how = f"the usual plan gives wrong results (run gptq-backend doctor): {choice.best}"
    elif choice.usual_seconds is None:
        how = f"the usual plan did not run ({choice.usual_reason}): {choice.best}"
    else:
        how = f"{choice.usual_seconds / choice.best_seconds:.2f}x as fast as usual: {choice.best}"
    return f"  M={choice.rows:<5} {choice.best_seconds * 1e6:>9.1f} us  {how}"


def as_json(choice: plans.Choice) -> dict[str, Any]:
    """The same as JSON values; times in microseconds."""
    return {
        "M": choice.rows,
        "plan": None if choice.best is None else dataclasses.asdict(choice.best),
        "us": choice.best_seconds * 1e6,
        "usual_plan": None if choice.usual is None else dataclasses.asdict(choice.usual),
        "usual_us": None if choice.usual_seconds is None else choice.usual_seconds * 1e6,
        "usual_reason": choice.usual_reason,
    }
