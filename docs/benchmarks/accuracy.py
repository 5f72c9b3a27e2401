"""One row of the table in accuracy.md: quantize on a set of calibration tokens, judge on others, print JSON.

python docs/benchmarks/accuracy.py MODEL TEXT TEST_TEXT --set 0 --config '{"bits": 4, "group_size": 64}'
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer

from gptq_backend import Events, QuantizeConfig
from gptq_backend.model import split_windows
from gptq_cli.evaluate import cut_windows, evaluate
from gptq_cli.models import load_model
from gptq_transformers import quantize


class Planned(Events):
    """Keeps how a budget was spent."""

    plan: dict[str, Any] | None = None

    def budget_planned(self, plan: Any) -> None:
        self.plan = plan.report()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--config", default="{}", help="JSON: fields of QuantizeConfig")
    parser.add_argument("--target-bits", type=float, help="a budget instead of bits and group_size")
    parser.add_argument("--target-size", help="likewise, such as 100MB")
    parser.add_argument("--set", type=int, default=0, help="which run of 64 x 512 calibration tokens")
    parser.add_argument("--windows", type=int, default=12, help="of 1024 tokens, from the start of the test text")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    windows = split_windows(tokenizer(arguments.calibration.read_text())["input_ids"], 512, tokenizer)
    samples = torch.tensor(windows[arguments.set * 64 : (arguments.set + 1) * 64])
    asked = json.loads(arguments.config)
    config = QuantizeConfig.from_dict(asked)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "quantized"
        start = time.process_time()
        budget = {"target_bits": arguments.target_bits, "target_size": arguments.target_size}
        events = Planned()
        _, report = quantize(arguments.model, config, samples, output=folder, events=events, **budget)
        cpu_seconds = time.process_time() - start
        judged = cut_windows(arguments.test.read_text(), tokenizer, 1024, arguments.windows)
        found = evaluate(load_model(folder), judged, load_model(arguments.model))
    refined = [layer.steps for layer in report.layers if layer.steps]
    gains = [math.log(steps[-1].error / steps[0].error) for steps in refined]
    result = {
        "model": Path(arguments.model).name,
        "asked": asked,
        "budget": events.plan and {key: value for key, value in events.plan.items() if key != "curve"},
        "config": config.to_dict(),
        "set": arguments.set,
        "seconds": report.seconds,
        "cpu_seconds": cpu_seconds,
        "error_after_refinement": math.exp(sum(gains) / len(gains)) if gains else None,
        "blocks": [dataclasses.asdict(block) for block in report.blocks],
        "distillation": report.distillation and dataclasses.asdict(report.distillation),
        "evaluation": dataclasses.asdict(found),
    }
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
