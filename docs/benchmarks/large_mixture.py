"""Memory and interruptions of quantizing a mixture of experts that is larger than the machine's memory.

    python docs/benchmarks/large_mixture.py make MODEL --layers 24         # 30.2 GB on disk, a layer per file
    python docs/benchmarks/large_mixture.py run MODEL OUT --kill-after 2 7 10 --json FILE

The model has Qwen3-30B-A3B's layers and random weights. ``run`` quantizes it in a process of its own, which it kills
(SIGKILL) in the middle of the block after each named number of finished ones and begins again. It notes each block's
seconds, what memory the process had of its own at the block's end, and the highest resident memory of all.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

HIDDEN, EXPERT, EXPERTS, VOCABULARY, HEADS, KEY_HEADS, HEAD = 2048, 768, 128, 32768, 32, 4, 128


def make(folder: Path, layers: int) -> None:
    """Write the model, one layer in memory at a time."""
    from safetensors.torch import save_file
    from transformers import Qwen3MoeConfig

    folder.mkdir(parents=True)
    Qwen3MoeConfig(
        architectures=["Qwen3MoeForCausalLM"], vocab_size=VOCABULARY, hidden_size=HIDDEN, moe_intermediate_size=EXPERT,
        num_hidden_layers=layers, num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, head_dim=HEAD,
        num_experts=EXPERTS, num_experts_per_tok=8, norm_topk_prob=True, tie_word_embeddings=False, dtype="bfloat16",
    ).save_pretrained(folder)  # fmt: skip
    random = torch.Generator().manual_seed(0)
    files: dict[str, str] = {}
    total = 0

    def save(number: int, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal total
        name = f"model-{number:05d}-of-{layers + 1:05d}.safetensors"
        save_file(tensors, folder / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))
        total += sum(tensor.nbytes for tensor in tensors.values())

    for layer in range(layers):
        save(layer + 1, {f"model.layers.{layer}.{name}": value for name, value in _layer(random).items()})
    outside = {"model.embed_tokens.weight": _matrix(VOCABULARY, HIDDEN, random) * HIDDEN**0.5}
    outside |= {"lm_head.weight": _matrix(VOCABULARY, HIDDEN, random), "model.norm.weight": _ones(HIDDEN)}
    save(layers + 1, outside)
    index = {"metadata": {"total_size": total}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _matrix(out: int, into: int, random: torch.Generator) -> torch.Tensor:
    return torch.randn(out, into, generator=random).mul_(into**-0.5).bfloat16()


def _ones(size: int) -> torch.Tensor:
    return torch.ones(size, dtype=torch.bfloat16)


def _layer(random: torch.Generator) -> dict[str, torch.Tensor]:
    """One decoder layer's tensors."""
    shapes = {
        "self_attn.q_proj": (HEADS * HEAD, HIDDEN),
        "self_attn.k_proj": (KEY_HEADS * HEAD, HIDDEN),
        "self_attn.v_proj": (KEY_HEADS * HEAD, HIDDEN),
        "self_attn.o_proj": (HIDDEN, HEADS * HEAD),
        "mlp.gate": (EXPERTS, HIDDEN),
    }
    for expert in range(EXPERTS):
        shapes[f"mlp.experts.{expert}.gate_proj"] = shapes[f"mlp.experts.{expert}.up_proj"] = (EXPERT, HIDDEN)
        shapes[f"mlp.experts.{expert}.down_proj"] = (HIDDEN, EXPERT)
    norms = {"input_layernorm": HIDDEN, "post_attention_layernorm": HIDDEN}
    norms |= {"self_attn.q_norm": HEAD, "self_attn.k_norm": HEAD}
    tensors = {f"{name}.weight": _ones(size) for name, size in norms.items()}
    return tensors | {f"{name}.weight": _matrix(*shape, random) for name, shape in shapes.items()}


def quantize(model: Path, output: Path, tokens: int) -> None:
    """What the process that is killed runs; writes a line of JSON at each event."""
    from gptq_backend import Events, QuantizeConfig
    from gptq_transformers import quantize as quantize_folder

    def say(**facts: Any) -> None:
        print(json.dumps({"time": time.time(), **facts}), flush=True)

    class Blocks(Events):
        """Says when a block is wanted, restored or done, and the memory then."""

        def block_needed(self, name: str, block: torch.nn.Module) -> None:
            say(event="needed", block=name)

        def block_restored(self, name: str) -> None:
            say(event="restored", block=name)

        def block_done(self, name: str, block: torch.nn.Module) -> None:
            say(event="done", block=name, **_memory("self"))

    samples = torch.randint(0, VOCABULARY, (tokens // 256, 256), generator=torch.Generator().manual_seed(1))
    config = QuantizeConfig(bits=4, group_size=128, quality="fast")
    _, report = quantize_folder(model, config, samples, output=output, events=Blocks())
    say(event="finished", layers=len(report.layers), **_memory("self"))


def _memory(process: int | str) -> dict[str, float]:
    """GB of a process: its own (no mapped files), and the most that was ever resident."""
    lines = (line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines())
    kib = {line[0]: int(line[1]) for line in lines if line[0] in ("RssAnon:", "VmHWM:")}
    return {"own_gb": kib["RssAnon:"] * 1024 / 1e9, "peak_gb": kib["VmHWM:"] * 1024 / 1e9}


def run(model: Path, output: Path, kill_after: list[int], tokens: int, delay: float) -> dict[str, Any]:
    """Quantize with interruptions; see the module."""
    runs = []
    for stop in [*kill_after, None]:
        runs.append(_one_run([str(model), str(output), "--tokens", str(tokens)], stop, delay))
        print(json.dumps(runs[-1]), flush=True)
    blocks = [block for one in runs for block in one["blocks"]]
    return {
        "model_gb": _size(model),
        "output_gb": _size(output),
        "memory_of_the_machine_gb": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "calibration_tokens": tokens,
        "kill_after": kill_after,
        "peak_resident_gb": max(one["peak_gb"] for one in runs),
        "most_of_its_own_at_a_blocks_end_gb": max(block["own_gb"] for block in blocks),
        "seconds_per_block_median": sorted(block["seconds"] for block in blocks)[len(blocks) // 2],
        "layers": runs[-1]["layers"],
        "runs": runs,
    }


def _one_run(arguments: list[str], stop: int | None, delay: float) -> dict[str, Any]:
    """One process, killed ``delay`` seconds into the block after ``stop`` finished or restored ones."""
    command = [sys.executable, __file__, "quantize", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    blocks: list[dict[str, Any]] = []
    restored: list[str] = []
    peak, layers, needed = 0.0, None, 0.0
    for line in process.stdout:
        fact = json.loads(line) if line.startswith("{") else {}
        peak = max(peak, fact.get("peak_gb", 0.0))
        event = fact.get("event")
        if event == "needed":
            needed = fact["time"]
            if stop is not None and len(restored) + len(blocks) == stop:
                time.sleep(delay)
                peak = max(peak, _memory(process.pid)["peak_gb"])
                process.kill()
                break
        elif event == "restored":
            restored.append(fact["block"])
        elif event == "done" and fact["block"] not in restored:
            blocks.append({"block": fact["block"], "seconds": fact["time"] - needed, "own_gb": fact["own_gb"]})
        elif event == "finished":
            layers = fact["layers"]
    code = process.wait()
    if stop is None and code != 0:
        raise SystemExit(f"{' '.join(command)} ended with {code}")
    return {"killed": stop is not None, "restored": len(restored), "peak_gb": peak, "layers": layers, "blocks": blocks}


def _size(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("make")
    making.add_argument("model", type=Path)
    making.add_argument("--layers", type=int, default=24)
    running = commands.add_parser("run")
    running.add_argument("--kill-after", type=int, nargs="*", default=[], help="numbers of finished blocks")
    running.add_argument("--delay", type=float, default=20, help="seconds into the next block before the kill")
    running.add_argument("--json", type=Path)
    for one in (running, commands.add_parser("quantize")):
        one.add_argument("model", type=Path)
        one.add_argument("output", type=Path)
        one.add_argument("--tokens", type=int, default=1024)
    asked = parser.parse_args()
    if asked.command == "make":
        make(asked.model, asked.layers)
    elif asked.command == "quantize":
        quantize(asked.model, asked.output, asked.tokens)
    else:
        found = run(asked.model, asked.output, asked.kill_after, asked.tokens, asked.delay)
        if asked.json:
            asked.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
