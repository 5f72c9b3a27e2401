"""Memory of each rank while a mixture of experts is quantized, for several numbers of ranks.

    python docs/benchmarks/mixture_memory.py --ranks 1 2 4 --json docs/benchmarks/mixture-memory.json
    python docs/benchmarks/large_mixture.py make MODEL --layers 8         # 10.2 GB on disk
    python docs/benchmarks/mixture_memory.py --model MODEL --json docs/benchmarks/mixture-memory-10gb.json

One block of a mixture with random weights, whose layers are all measured before any is quantized
(``true_sequential=False``): then the Hessians and factors of all experts are in memory at once. Or the first blocks of
a MODEL on disk, with the settings that a user has. Noted is the highest resident memory of each process, and how far it
is above what it was before the run; of its own memory, without mapped files, what was most in a look every 0.1 s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

from gptq_backend.distributed import Team

HIDDEN, EXPERT, EXPERTS, CHOSEN, TOKENS = 1024, 512, 32, 4, 16384
LARGE_TOKENS = 4096


def resident() -> int:
    """Bytes, the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Enough(Exception):
    """Ends a run after so many blocks."""


def first_blocks(model: Path, blocks: int, team: Team) -> None:
    """Quantize those of a model on disk, as ``gptq-backend quantize`` would all of them."""
    from gptq_backend import Events, QuantizeConfig
    from gptq_transformers import quantize

    class Blocks(Events):
        """Counts them."""

        count = 0

        def block_needed(self, name: str, block: torch.nn.Module) -> None:
            if self.count == blocks:
                raise Enough
            self.count += 1

    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    samples = torch.randint(0, vocabulary, (LARGE_TOKENS // 512, 512), generator=torch.Generator().manual_seed(1))
    config = QuantizeConfig(bits=4, group_size=128, quality="fast")
    with tempfile.TemporaryDirectory() as folder, contextlib.suppress(Enough):
        quantize(model, config, samples, output=Path(folder) / "out", events=Blocks(), team=team)


def block_at_once(team: Team) -> None:
    """Quantize one block with random weights, all of whose Hessians are in memory together."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from gptq_backend import QuantizeConfig, quantize_model
    from gptq_transformers.experts.unfuse import unfuse_experts

    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": EXPERT, "num_experts": EXPERTS, "vocab_size": 1024}
    sizes |= {"num_experts_per_tok": CHOSEN, "num_hidden_layers": 1, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes), dtype=torch.bfloat16).eval()
    unfuse_experts(model)
    samples = torch.randint(0, 1024, (TOKENS // 512, 512), generator=torch.Generator().manual_seed(1))
    config = QuantizeConfig(bits=4, group_size=128, quality="fast", true_sequential=False)
    quantize_model(model, config, samples, team=team)


def own() -> int:
    """Bytes of memory that is the process's alone, without mapped files."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) * 1024


def rank(target: Path, model: Path | None, blocks: int) -> None:
    """What each process runs."""
    from gptq_backend.distributed import joined

    most, end = [0], threading.Event()

    def watch() -> None:
        while not end.wait(0.1):
            most[0] = max(most[0], own())

    with joined("cpu") as (team, _):
        before, start, watching = resident(), time.perf_counter(), threading.Thread(target=watch)
        watching.start()
        if model is None:
            block_at_once(team)
        else:
            first_blocks(model, blocks, team)
        seconds = time.perf_counter() - start
        end.set()
        watching.join()
        numbers = torch.tensor([resident(), resident() - before, most[0]])
        found = [each.tolist() for (each,) in team.all_gather([numbers])]
    if team.first:
        names = ("peak_bytes", "grown_bytes", "own_peak_bytes")
        rows = [dict(zip(names, each, strict=True)) for each in found]
        target.write_text(json.dumps({"ranks": team.size, "seconds": seconds, "by_rank": rows}))


def one(ranks: int, options: list[str]) -> dict[str, Any]:
    """A run with so many."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*torchrun, __file__, "--rank", str(target), *options], check=True, env=environment)
        return json.loads(target.read_text())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--model", type=Path, help="a folder; without it one block with random weights")
    parser.add_argument("--blocks", type=int, default=2, help="of MODEL")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank is not None:
        rank(asked.rank, asked.model, asked.blocks)
        return
    options = [] if asked.model is None else ["--model", str(asked.model), "--blocks", str(asked.blocks)]
    rows = []
    for ranks in asked.ranks:
        rows.append(one(ranks, options))
        print(json.dumps(rows[-1]), flush=True)
    sizes = {"hidden": HIDDEN, "expert": EXPERT, "experts": EXPERTS, "chosen": CHOSEN, "tokens": TOKENS}
    if asked.model is not None:
        total = sum(file.stat().st_size for file in asked.model.glob("*.safetensors"))
        sizes = {"bytes": total, "blocks_quantized": asked.blocks, "tokens": LARGE_TOKENS}
    if asked.json:
        command = " ".join(["python", "docs/benchmarks/mixture_memory.py", *sys.argv[1:]])
        asked.json.write_text(
            json.dumps({"command": command, "model": sizes, "threads": 1, "runs": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
