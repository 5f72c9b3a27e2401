"""Calibrate on one kind of text, on a random mix or on `auto`'s choice; judge layer errors on every kind of text.

python docs/benchmarks/calibration_matrix.py MODEL TEXTS --json matrix.json

TEXTS is a folder with code.txt, dialogue.txt, encyclopedia.txt and prose.txt, of which nothing is in the package.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_backend import QuantizeConfig, quantize_model
from gptq_backend.algorithm.gptq import prepare_factor, quantize_weight
from gptq_backend.algorithm.hessian import Hessian
from gptq_backend.model.calibration_choice import select, sketch
from gptq_transformers import auto_calibration as auto

DOMAINS = ("code", "dialogue", "encyclopedia", "prose")
LAYERS = ("4.self_attn.q_proj", "12.self_attn.o_proj", "22.mlp.gate_proj", "12.mlp.down_proj", "4.mlp.gate_proj")
SEQLEN, JUDGED, POOL, CHOSEN, SEEDS, ROWS = 256, 128, 8, 16, 16, 48
CONFIG = QuantizeConfig(bits=4, group_size=64, quality="fast")


def inputs(model: Any, ids: Tensor) -> dict[str, Tensor]:
    """What the layers read in the 16-bit model: [N, T, K] each."""
    seen: dict[str, list[Tensor]] = {name: [] for name in LAYERS}
    for name in LAYERS:
        model.get_submodule(f"model.layers.{name}").register_forward_pre_hook(
            lambda _, x, name=name: seen[name].append(x[0])
        )
    with torch.no_grad():
        for batch in ids.split(8):
            model.model(batch)
    return {name: torch.cat(found) for name, found in seen.items()}


def sets(moments: Tensor, names: list[str], channels: int, seed: int) -> dict[str, list[int]]:
    """Windows to calibrate on by row of the matrix; random and automatic choose from the same pool."""
    generator = torch.Generator().manual_seed(seed)
    members = {name: [i for i, other in enumerate(names) if other == name] for name in dict.fromkeys(names)}
    shuffled = {name: [own[i] for i in torch.randperm(len(own), generator=generator)] for name, own in members.items()}
    pool = [i for own in shuffled.values() for i in sorted(own[:POOL])]
    judges = [i for own in shuffled.values() for i in own[:2]]
    free = [i for i in pool if i not in judges]
    random = [free[i] for i in torch.randperm(len(free), generator=generator)[:CHOSEN]]
    where = [pool.index(i) for i in judges]
    weights = dict.fromkeys(members, 1.0)
    pooled = [names[i] for i in pool]
    found = select(
        moments[pool], pooled, weights, CHOSEN, held_out=where, channels=channels, tokens=SEQLEN, least=CHOSEN
    )
    return {
        "random": random,
        "automatic": [pool[i] for i in found.chosen],
        **{f"only {name}": shuffled[name][:CHOSEN] for name in DOMAINS},
    }


def error(weight: Tensor, calibration: Tensor, judges: dict[str, Hessian], name: str) -> list[float]:
    """Relative errors on the judges' inputs of a layer quantized on the calibration inputs."""
    seen = Hessian(weight.shape[1])
    seen.add(calibration.float())
    factor = prepare_factor(seen.matrix(name), CONFIG, seen.tokens)
    difference = quantize_weight(weight, factor, CONFIG).weight.dequantize(torch.float32) - weight
    results = []
    for judge in judges.values():
        matrix = judge.matrix(name)
        results.append(float(((difference @ matrix) * difference).sum() / ((weight @ matrix) * weight).sum()))
    return results


def logits(model: Any, windows: Tensor) -> list[Tensor]:
    """Log-probabilities of the judges' windows, a domain at a time."""
    with torch.no_grad():
        return [model(own[:, :JUDGED], use_cache=False).logits.log_softmax(-1) for own in windows.split(4)]


def divergence(model: Any, calibration: Tensor, windows: Tensor, reference: list[Tensor]) -> list[float]:
    """Mean KL divergence by domain of the whole model, quantized on the calibration windows."""
    quantized = copy.deepcopy(model)
    quantize_model(quantized, CONFIG, list(calibration))
    pairs = zip(reference, logits(quantized, windows), strict=True)
    return [float((right.exp() * (right - ours)).sum(-1).mean()) for right, ours in pairs]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("texts", type=Path)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--cache", type=Path, help="keeps windows and activations between runs")
    parser.add_argument("--kld", action="store_true", help="random and automatic only, by the whole model's KLD")
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    if arguments.cache and arguments.cache.exists():
        data = torch.load(arguments.cache)
    else:
        data = capture(model, tokenizer, arguments.texts)
        if arguments.cache:
            torch.save(data, arguments.cache)
    names, ids = data["names"], data["ids"]
    rows = [sets(data["moments"], names, model.config.hidden_size, seed) for seed in range(SEEDS)]
    counts = [dict(Counter(names[i] for i in row["automatic"])) for row in rows]
    errors: dict[str, dict[str, list[list[float]]]] = {}

    def add(kind: str, what: str, measured: list[float]) -> None:
        errors.setdefault(kind, {}).setdefault(what, []).append(measured)
        found = {"domains": DOMAINS, "config": CONFIG.to_dict(), "chosen": counts, "errors": errors}
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")

    if arguments.kld:
        windows = ids[len(names) :]
        reference = logits(model, windows)
        for row in rows[:5]:
            for kind in ("random", "automatic"):
                add(kind, "kld", divergence(model, ids[row[kind]], windows, reference))
            report(errors)
        return
    for name in LAYERS:
        x = data["inputs"][name]
        judges = {domain: Hessian(x.shape[-1]) for domain in DOMAINS}
        for judge, own in zip(judges.values(), x[len(names) :].split(4), strict=True):
            judge.add(own.float())
        weight = model.get_submodule(f"model.layers.{name}").weight.detach()[:ROWS]
        for i, row in enumerate(rows):
            for kind, chosen in row.items():
                if i < 5 or not kind.startswith("only"):
                    add(kind, name, error(weight, x[chosen], judges, name))
        report(errors)


def capture(model: Any, tokenizer: Any, folder: Path) -> dict[str, Any]:
    """The pool, then the judges' windows: token ids, names of the pool's sources, sketches, inputs of layers."""
    windows = {
        name: auto._windows(text, tokenizer, SEQLEN, 20 if name in DOMAINS else POOL, 0)
        for name, text in auto.packaged_texts().items()
    }
    windows[auto.MODEL] = auto._sampled(model, tokenizer, POOL, SEQLEN, 0)
    judged = [auto._windows((folder / f"{name}.txt").read_text(), tokenizer, SEQLEN, 4, 0) for name in DOMAINS]
    pool = torch.cat(list(windows.values()))
    ids = torch.cat([pool, *judged])
    names = [name for name, own in windows.items() for _ in own]
    return {"ids": ids, "names": names, "moments": sketch(model, pool), "inputs": inputs(model, ids)}


def report(errors: dict[str, dict[str, list[list[float]]]]) -> None:
    """Errors as a share of the random mix's of the same seed: geometric means over layers and seeds."""
    for kind, found in errors.items():
        logs = torch.tensor(list(found.values())).log()
        random = torch.tensor([errors["random"][name][: logs.shape[1]] for name in found]).log()
        print(f"{kind:18}", *(f"{value:.3f}" for value in (logs - random).mean((0, 1)).exp()), flush=True)


if __name__ == "__main__":
    main()
