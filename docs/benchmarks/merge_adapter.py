"""What merging an adapter into a 4-bit checkpoint again costs, beside what quantizing its base cost.

    python docs/benchmarks/merge_adapter.py ORIGINAL QUANTIZED FOLDER [--steps N] [--json FILE]

A LoRA (rank 16, all linear layers) is trained by peft on the dequantized weights of QUANTIZED with packaged text, saved
to FOLDER/adapter (taken from there if it exists), and merged in each way. All KL divergences are in nats per token, on
the same held-out windows: of QUANTIZED from ORIGINAL, and of each merged model from QUANTIZED with the adapter on top.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer

import gptq_transformers
from gptq_backend.bench import describe_machine
from gptq_backend.locks import write_text
from gptq_backend.model import sample_windows, tokenize
from gptq_cli.evaluate import cut_windows, evaluate
from gptq_cli.models import load_model
from gptq_transformers.auto_calibration import packaged_texts
from gptq_transformers.merging import merge_adapter, plainly_rounded, with_adapter

TRAINED_ON, CALIBRATED_ON, HELD_OUT = (
    "dialogue",
    ("prose", "encyclopedia"),
    Path("tests/data/wikitext2-test-excerpt.txt"),
)
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original")
    parser.add_argument("quantized")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--rate", type=float, default=5e-4)
    parser.add_argument("--windows", type=int, default=4)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(arguments.original)
    adapter = arguments.folder / "adapter"
    if not adapter.exists():
        train(arguments.quantized, tokenizer, adapter, arguments.steps, arguments.rate)
    text = packaged_texts()
    held_out = {
        "wikitext": cut_windows(HELD_OUT.read_text(encoding="utf-8"), tokenizer, 512, arguments.windows),
        "like the training text": torch.stack(tokenize(text[TRAINED_ON], tokenizer, 512)[-arguments.windows :]),
    }
    calibration = [text[name] for name in CALIBRATED_ON] + [text[TRAINED_ON][: len(text[TRAINED_ON]) * 3 // 4]]
    merged, seconds = {}, {}
    for name, source in (("calibrated", calibration), ("not calibrated", None)):
        start = time.perf_counter()
        merge_adapter(
            arguments.quantized,
            adapter,
            arguments.folder / name,
            source,
            seqlen=512 if source else None,
            samples=64 if source else None,
            overwrite=True,
        )
        seconds[name] = time.perf_counter() - start
        merged[name] = load_model(arguments.folder / name)
    base, original = load_model(arguments.quantized), load_model(arguments.original)
    on_top = with_adapter(arguments.quantized, adapter)
    merged["plain rounding"] = plainly_rounded(arguments.quantized, adapter)
    merged["the adapter left out"] = base
    rows = []
    for name, windows in held_out.items():
        row: dict[str, Any] = {"text": name, "quantizing the base": evaluate(base, windows, original).kld}
        row |= {key: evaluate(model, windows, on_top).kld for key, model in merged.items()}
        rows.append(row)
        print(json.dumps(row, indent=1), flush=True)
    print(seconds)
    if arguments.json:
        machine = describe_machine(CPU, "python docs/benchmarks/merge_adapter.py ORIGINAL QUANTIZED FOLDER")
        result = {
            "machine": machine,
            "steps": arguments.steps,
            "rate": arguments.rate,
            "seconds": seconds,
            "rows": rows,
        }
        write_text(arguments.json, json.dumps(result, indent=2) + "\n")


def train(quantized: str, tokenizer: Any, folder: Path, steps: int, rate: float) -> None:
    """A LoRA on the dense weights, two windows of 128 tokens a step."""
    import peft

    torch.manual_seed(0)
    model: Any = gptq_transformers.from_quantized(quantized, dtype=torch.float32)
    model = model.dequantize()
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tuned = peft.get_peft_model(model.float(), peft.LoraConfig(r=16, lora_alpha=32, target_modules=names))
    text = packaged_texts()[TRAINED_ON]
    windows = tokenize(text[: len(text) * 3 // 4], tokenizer, 128)
    batches = sample_windows(windows * (1 + 2 * steps // len(windows)), 2 * steps, 0)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], rate)
    for step in range(steps):
        ids: Tensor = torch.stack([torch.as_tensor(each) for each in batches[2 * step : 2 * step + 2]])
        loss = tuned(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 10 == 0:
            print(f"step {step}: loss {loss.item():.3f}", flush=True)
    tuned.save_pretrained(folder)


if __name__ == "__main__":
    main()
