"""Which estimate tells what rounding costs a model? Predicted and measured, for groups of layers and mixtures.

    python docs/benchmarks/sensitivity.py MODEL wikitext2-valid.txt wikitext2-test.txt > sensitivity.json

All layers are rounded by ``fast`` to 2, 3 and 4 bits in groups of 64 for the inputs of the 16-bit model, and the KL
divergence is measured with some of them put into the model. Predictions:

- gradients: what ``--target-bits`` goes by (gptq_backend/budget/divergence.py);
- noise: the divergence that random noise in the group causes, in proportion to the square of the relative error (the
  linearity theorem of arXiv 2411.17525);
- error: the squared relative error of the weights alone.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

from gptq_backend import QuantizeConfig, RunOptions
from gptq_backend.budget import divergence, rounding
from gptq_backend.budget.predictions import predictions
from gptq_backend.budget.storage import Storage
from gptq_backend.model import split_windows
from gptq_backend.model.calibration import make_batches
from gptq_backend.model.placement import Placement
from gptq_backend.training.distill import summed_divergence
from gptq_transformers.streaming import load_whole

WIDTHS = (2, 3, 4)
NOISE = 0.05  # relative, of the noise
BLOCKS = (0, 12, 29)
SAMPLES = 8  # windows of calibration text
MIXTURES = 8


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--windows", type=int, default=1, help="of 512 tokens of the test text")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    tokenizer, model = AutoTokenizer.from_pretrained(arguments.model), load_whole(arguments.model, torch.float32)

    def windows(path: Path, count: int) -> Tensor:
        return torch.tensor(split_windows(tokenizer(path.read_text())["input_ids"], 512, tokenizer)[:count])

    rounding._CHANNELS = 1 << 30  # all
    storages = [Storage(64, bits) for bits in WIDTHS]
    samples, config = windows(arguments.calibration, SAMPLES), QuantizeConfig(group_size=64)
    groups = rounding.probe_rounding(model, config, make_batches(samples, None), storages, RunOptions(), lambda: None)
    placement = Placement()
    costs = divergence.predict_divergences(model, groups, make_batches(samples, 1), placement, lambda: None)
    judged = make_batches(windows(arguments.test, arguments.windows), 1)
    original = [predictions(model, batch, placement) for batch in judged]

    def measure(changes: Mapping[rounding.Probe, Tensor]) -> float:
        with changed(changes):
            found = [predictions(model, batch, placement) for batch in judged]
        total = sum(summed_divergence(a, b) for a, b in zip(found, original, strict=True))
        return total / sum(map(len, original))

    result: dict[str, Any] = {"model": Path(arguments.model).name, "singles": [], "mixtures": []}
    shown = {i for i, group in enumerate(groups) if int(group.block.rpartition(".")[2]) in BLOCKS}
    noise = {}
    for i in sorted(shown):
        noise[i] = measure({probe: noise_of(probe) for probe in groups[i].probes}) / NOISE**2
        storage = Storage(64, 3)
        found = measure({probe: probe.errors[storage] for probe in groups[i].probes})
        entry = {"gradients": costs[i][storage], "noise": noise[i] * error(groups[i], storage)}
        result["singles"].append(
            {"layers": groups[i].names, "measured": found, **entry, "error": error(groups[i], storage)}
        )
    draw = random.Random(0)
    for number in range(MIXTURES):
        shares = [draw.random() for _ in WIDTHS]
        mixed = [Storage(64, draw.choices(WIDTHS, shares)[0]) for _ in groups]
        found = measure({p: p.errors[each] for group, each in zip(groups, mixed, strict=True) for p in group.probes})
        predicted = sum(cost[each] for cost, each in zip(costs, mixed, strict=True))
        errors = sum(error(group, each) for group, each in zip(groups, mixed, strict=True))
        result["mixtures"].append({"number": number, "measured": found, "gradients": predicted, "error": errors})
    print(json.dumps(result, indent=2))


@contextmanager
def changed(changes: Mapping[rounding.Probe, Tensor]) -> Iterator[None]:
    """Something added to weights."""
    kept = {probe: probe.target.module.weight.data for probe in changes}
    for probe, change in changes.items():
        probe.target.module.weight.data = kept[probe] + change
    try:
        yield
    finally:
        for probe, weight in kept.items():
            probe.target.module.weight.data = weight


def noise_of(probe: rounding.Probe) -> Tensor:
    weight: Tensor = probe.target.module.weight  # type: ignore[assignment]
    drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(0))
    return drawn * NOISE * weight.norm() / drawn.norm()


def error(group: rounding.Group, storage: Storage) -> float:
    """Squared relative error of the weights of a group."""
    lost = sum(float(probe.errors[storage].square().sum()) for probe in group.probes)
    weights: list[Tensor] = [probe.target.module.weight for probe in group.probes]  # type: ignore[misc]
    return lost / sum(float(weight.square().sum()) for weight in weights)


if __name__ == "__main__":
    main()
