"""A model of a given shape with random weights, 4 bits against 16: memory, prefill and decode. Needs no checkpoint.

python docs/benchmarks/decode_shape.py OUT.json --shape llama2-7b --device cuda
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import sys
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig

from gptq_backend import QuantLinear
from gptq_backend.bench import DTYPES, Problem, Weight, describe_machine, products
from gptq_backend.locks import write_text
from gptq_cli import bench_model
from gptq_cli.model_shapes import SHAPES


def build(shape: str, dtype: str, device: torch.device, quantized: bool) -> tuple[nn.Module, int]:
    """The model, and the bytes of its parameters and buffers (on a GPU: what its allocator has handed out for them)."""
    config = LlamaConfig(**SHAPES[shape], max_position_embeddings=4096)
    before = _allocated(device)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=DTYPES[dtype]).eval()
    if quantized:
        for name, linear in [*model.named_modules()]:
            if isinstance(linear, nn.Linear) and name != "lm_head":
                model.set_submodule(name, _quantized(linear, dtype, device))
    tensors = [*model.parameters(), *model.buffers()]
    return model, _allocated(device) - before if device.type == "cuda" else sum(each.nbytes for each in tensors)


def _quantized(linear: nn.Linear, dtype: str, device: torch.device) -> QuantLinear:
    """A random layer of the same shape: 4 bits, groups of 128 (or K), symmetric."""
    problem = Problem(linear.out_features, linear.in_features, 4, min(128, linear.in_features), dtype=dtype)
    return products.layer(Weight.random(problem, device), None)


def _allocated(device: torch.device) -> int:
    gc.collect()
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def main(arguments: list[str]) -> None:
    """Print and write memory and rates of both models."""
    parser = argparse.ArgumentParser()
    parser.add_argument("target", type=Path)
    parser.add_argument("--shape", choices=SHAPES, default="llama2-7b")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compile", action="store_true")
    asked = parser.parse_args(arguments)
    device = torch.device(asked.device)
    memory, models = {}, []
    for name in ("4-bit", "16-bit"):
        model, memory[name] = build(asked.shape, asked.dtype, device, name == "4-bit")
        models.append((name, model))
        print(f"{name}: {memory[name] / 1e9:.2f} GB")
    print(f"4-bit takes {memory['4-bit'] / memory['16-bit']:.1%} of 16-bit")
    rows = bench_model.run(models, 1, asked.prompt, asked.new_tokens, asked.repeats, asked.compile)
    for row in rows:
        mode = "compiled" if row.compiled else "eager"
        print(f"{row.model:<8}{mode:<10}{row.phase:<9}{row.tokens_per_second:10.1f} tokens/s  {row.ratio or 1:.2f}x")
    command = "python docs/benchmarks/decode_shape.py " + " ".join(arguments)
    result = {"machine": describe_machine(device, command), "shape": asked.shape, "bytes": memory}
    result["rows"] = [dataclasses.asdict(row) for row in rows]
    write_text(asked.target, json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main(sys.argv[1:])
