"""Error of single layers on another text than the one calibrated on, for several settings: a quick look before a run.

python docs/benchmarks/layer_errors.py MODEL wikitext2-valid.txt wikitext2-test.txt --bits 4
"""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_backend import QuantizeConfig
from gptq_backend.algorithm.gptq import prepare_factor, quantize_weight
from gptq_backend.algorithm.hessian import Hessian

SETTINGS: dict[str, dict[str, Any]] = {
    "fast": {"quality": "fast"},
    "signed scales": {"search_finalists": 1, "refine_sweeps": 0},
    "+ 4 finalists": {"refine_sweeps": 0},
    "default": {},
    "best, not distilled": {"quality": "best"},
    "default, plain order": {"act_group_aware": False},
    "default, static act-order": {"desc_act": True, "static_groups": True},
    "default, damping 0.01": {"damp_percent": 0.01},
    "default, damping 0.05": {"damp_percent": 0.05},
}


def hessians(model: nn.Module, names: list[str], tokens: Tensor) -> dict[str, Hessian]:
    found = {name: Hessian(model.get_submodule(name).in_features) for name in names}  # type: ignore[arg-type]
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: found[name].add(args[0]))
        for name in names
    ]
    with torch.no_grad():
        for batch in tokens.split(4):
            model(batch)
    for hook in hooks:
        hook.remove()
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("calibration", type=Path)
    parser.add_argument("test", type=Path)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=64)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--blocks", type=int, nargs="+", default=[4, 20])
    parser.add_argument("--samples", type=int, default=64, help="calibrate on so many x 512 tokens")
    parser.add_argument("--rows", type=int, default=96, help="output channels of each layer to quantize")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    kinds = ("self_attn.q_proj", "self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")
    names = [f"model.layers.{block}.{kind}" for block in arguments.blocks for kind in kinds]
    texts = ((arguments.calibration, arguments.samples), (arguments.test, 64))
    seen, other = (
        hessians(model, names, torch.tensor(tokenizer(file.read_text())["input_ids"][: count * 512]).view(count, 512))
        for file, count in texts
    )
    base: list[float] = []
    for label, settings in SETTINGS.items():
        config = QuantizeConfig(
            bits=arguments.bits, group_size=arguments.group_size, sym=not arguments.asym, **settings
        )
        errors = []
        for name in names:
            weight = model.get_submodule(name).weight.detach()[: arguments.rows].double()  # type: ignore[operator,union-attr]
            shared = prepare_factor(seen[name].matrix(name), config, seen[name].tokens)
            difference = quantize_weight(weight, shared, config).weight.dequantize(torch.float64) - weight
            judge = other[name].matrix(name).double()
            errors.append(float(((difference @ judge) * difference).sum() / ((weight @ judge) * weight).sum()))
        base = base or errors
        mean = math.exp(sum(math.log(error / first) for error, first in zip(errors, base, strict=True)) / len(errors))
        print(f"{label:26} {mean:.3f} of fast's error", flush=True)


if __name__ == "__main__":
    main()
