"""The work of ``gptq-backend tune``: which layers, and what is printed of them."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from gptq_backend import KERNELS, GPTQError
from gptq_backend.bench import Problem, plans

from . import bench_gemm, terminal
from .checkpoint import Layer, read_checkpoint

# Layers with the same input, which vLLM multiplies by as one.
_JOINED = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


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
    wanted = layers(read_checkpoint(model).layers) if model is not None else []
    if shapes or lists or model is None:
        pairs = bench_gemm.read_shapes(shapes, lists)
        wanted += bench_gemm.problems(pairs, bits, group_size, "fp16", sym=True, act_order=False)
    device = require_gpu(device_name, wanted)
    found: list[dict[str, Any]] = []
    for problem in dict.fromkeys(wanted):
        title = f"{problem.N}x{problem.K}, {problem.bits} bits, group {problem.group_size}"
        with console.status(title, spinner="line"):
            choices = list(plans.tune(problem, rows, device, seconds))
        say("\n".join([title, *map(line, choices)]))
        found += [{**dataclasses.asdict(problem), **as_json(each)} for each in choices]
    path = plans.table_path(device)
    say(f"kept in {path}")
    terminal.write_json(json_target, {"device": torch.cuda.get_device_name(device), "file": str(path), "rows": found})


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
    """The layers of a checkpoint, and those that are joined in vLLM. Experts are left out: Triton serves them."""
    problems: list[Problem] = []
    parents: dict[str, dict[str, Problem]] = defaultdict(dict)
    for layer in found:
        parent, _, name = layer.name.rpartition(".")
        if "experts" in parent.split("."):
            continue
        spec = layer.spec
        problem = Problem(
            spec.out_features, spec.in_features, spec.bits, spec.group_size, spec.sym, spec.act_order, dtype="fp16"
        )
        parents[parent][name] = problem
        problems.append(problem)
    for inside in parents.values():
        for names in _JOINED:
            parts = [inside[name] for name in names if name in inside]
            joined = Problem(**{**dataclasses.asdict(parts[0]), "N": sum(part.N for part in parts)}) if parts else None
            if joined is not None and len(parts) == len(names):
                problems.append(joined)
    return list(dict.fromkeys(problems))


def line(choice: plans.Choice) -> str:
    """One number of rows, for people."""
    if choice.best == choice.usual:
        how = "the usual plan"
    elif choice.usual_seconds is None:
        how = f"the usual plan did not run: {choice.best}"
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
    }
