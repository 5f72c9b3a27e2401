"""Memory of each rank while a mixture of experts is quantized, for several numbers of ranks.

    python docs/benchmarks/mixture_memory.py --ranks 1 2 4 --json docs/benchmarks/mixture-memory.json

One block of a mixture with random weights, whose layers are all measured before any is quantized
(``true_sequential=False``): then the Hessians and factors of all experts are in memory at once. Noted is the highest
resident memory of each process, and how far it is above what it was before the run.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

HIDDEN, EXPERT, EXPERTS, CHOSEN, TOKENS = 1024, 512, 32, 4, 16384


def resident() -> int:
    """Bytes, the most so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def rank(target: Path) -> None:
    """What each process runs."""
    from transformers import AutoModelForCausalLM, Qwen3MoeConfig

    from gptq_backend import QuantizeConfig, quantize_model
    from gptq_backend.distributed import joined
    from gptq_transformers.experts.unfuse import unfuse_experts

    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": EXPERT, "num_experts": EXPERTS, "vocab_size": 1024}
    sizes |= {"num_experts_per_tok": CHOSEN, "num_hidden_layers": 1, "num_attention_heads": 8}
    sizes |= {"num_key_value_heads": 2, "head_dim": 128, "max_position_embeddings": 1024}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(Qwen3MoeConfig(**sizes), dtype=torch.bfloat16).eval()
    unfuse_experts(model)
    samples = torch.randint(0, 1024, (TOKENS // 512, 512), generator=torch.Generator().manual_seed(1))
    config = QuantizeConfig(bits=4, group_size=128, quality="fast", true_sequential=False)
    with joined("cpu") as (team, _):
        before, start = resident(), time.perf_counter()
        quantize_model(model, config, samples, team=team)
        seconds = time.perf_counter() - start
        numbers = torch.tensor([resident(), resident() - before])
        found = [each.tolist() for (each,) in team.all_gather([numbers])]
    if team.first:
        names = ("peak_bytes", "grown_bytes")
        rows = [dict(zip(names, each, strict=True)) for each in found]
        target.write_text(json.dumps({"ranks": team.size, "seconds": seconds, "by_rank": rows}))


def one(ranks: int) -> dict[str, Any]:
    """A run with so many."""
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "result.json"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        torchrun += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run([*torchrun, __file__, "--rank", str(target)], check=True, env=environment)
        return json.loads(target.read_text())


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[1, 2, 4])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.rank is not None:
        rank(asked.rank)
        return
    rows = []
    for ranks in asked.ranks:
        rows.append(one(ranks))
        print(json.dumps(rows[-1]), flush=True)
    sizes = {"hidden": HIDDEN, "expert": EXPERT, "experts": EXPERTS, "chosen": CHOSEN, "tokens": TOKENS}
    if asked.json:
        command = " ".join(["python", "docs/benchmarks/mixture_memory.py", *sys.argv[1:]])
        asked.json.write_text(
            json.dumps({"command": command, "model": sizes, "threads": 1, "runs": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
