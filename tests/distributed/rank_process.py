"""One of several processes that quantize toy models together, or one alone; each writes what it has at the end.

[torchrun --nproc-per-node N] rank_process.py OUT CASE ...
"""

from __future__ import annotations

import dataclasses
import json
import sys
import weakref
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from gptq_backend import Events, QuantizeConfig, RunOptions, quantize_model
from gptq_backend.algorithm import gptq, hessian, row_feedback
from gptq_backend.algorithm.hessian import Hessian
from gptq_backend.distributed import Team, joined
from gptq_backend.model import layer_inputs
from tests.toy import SparseMlp, samples, toy

SPARSE = partial(SparseMlp, 5, True)
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {  # of the model, and of the settings
    "dense": ({}, {}),
    "parallel blocks": ({"parallel": True}, {"lm_head": True}),
    "act-order": ({}, {"desc_act": True}),
    "static groups": ({}, {"desc_act": True, "static_groups": True, "sym": False}),
    "experts": ({"mlp": SPARSE}, {}),
    "experts of 16 bits": ({"mlp": SPARSE, "dtype": torch.bfloat16}, {"dynamic": {"-:.*experts.1.up": {}}}),
    "experts, measured at once": ({"mlp": SPARSE}, {"true_sequential": False}),
    "dense, measured at once": ({}, {"true_sequential": False}),
    "training": ({"dtype": torch.float32}, {"block_epochs": 2}),
    "training of experts": ({"dtype": torch.float32, "mlp": SPARSE}, {"block_epochs": 1, "desc_act": True}),
    "two batches": ({}, {}),
    "to nearest": ({}, {}),
}


class Counted(Hessian):
    """Knows the most bytes of Hessians that were in memory at once."""

    alive = most = 0

    def __init__(self, channels: int, dtype: torch.dtype, *args: Any) -> None:
        super().__init__(channels, dtype, *args)
        size = channels**2 * dtype.itemsize
        Counted.alive += size
        Counted.most = max(Counted.most, Counted.alive)
        weakref.finalize(self, Counted.forget, size)

    @staticmethod
    def forget(size: int) -> None:
        Counted.alive -= size


class Told(Events):
    """What a run tells that does not depend on time."""

    def __init__(self) -> None:
        self.layers: list[str] = []
        self.elsewhere: list[int] = []  # layers of a block whose weights this rank does not need

    def weights_elsewhere(self, name: str, layers: frozenset[torch.nn.Module]) -> None:
        self.elsewhere.append(len(layers))

    def layer_done(self, layer: Any, done: int, total: int) -> None:
        self.layers.append(layer.name)


def quantize(case: str, team: Team, out: Path) -> None:
    """Write the state and the report of one case."""
    shape, settings = CASES[case]
    model = toy(**shape)
    config = QuantizeConfig(bits=4, group_size=16, **settings)
    data = samples(4) if case == "two batches" else [*samples(9), *samples(4, 17)]
    told, turns = Told(), 0

    def in_turns(*args: Any) -> Any:
        nonlocal turns
        turns += 1
        return row_feedback.in_turns(*args)

    gptq.in_turns = in_turns  # type: ignore[attr-defined]
    Counted.most = Counted.alive
    options, calibration = RunOptions(batch_size=2), None if case == "to nearest" else data
    report = quantize_model(model, config, calibration, options=options, events=told, team=team)
    layers = [dataclasses.asdict(layer) | {"seconds": 0} for layer in report.layers]
    blocks = [dataclasses.asdict(each) for each in report.blocks]
    facts = {
        "run": {"layers": layers, "blocks": blocks, "told": sorted(told.layers)},
        "hessian_bytes": Counted.most,
        "elsewhere": told.elsewhere,
        "turns": turns,
    }
    name = f"{case}.{team.rank}"
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, out / f"{name}.safetensors")
    (out / f"{name}.json").write_text(json.dumps(facts))


def main() -> None:
    """Every case, one after another."""
    out = Path(sys.argv[1])
    out.mkdir(exist_ok=True)
    torch.set_num_threads(1)
    layer_inputs.Hessian = Counted  # type: ignore[misc]
    # Small enough for toys to have several parts of everything.
    gptq._CPU_ROWS, hessian._TILE, hessian._INVERSE_COLUMNS = 8, 16, 8
    row_feedback._GAIN = 3.0  # for layers that it hardly helps, too
    with joined("cpu") as (team, _):
        for case in sys.argv[2:] or CASES:
            quantize(case, team, out)


if __name__ == "__main__":
    main()
