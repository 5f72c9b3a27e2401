"""How long does quantizing a model of a given shape take, phase by phase, and how much memory? Needs no checkpoint."""

from __future__ import annotations

import itertools
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel

from gptq_backend import Events, GPTQError, QuantizeConfig, RunOptions, quantize_model
from gptq_backend.bench import DTYPES
from gptq_backend.distributed import Team
from gptq_backend.locks import scratch_folder
from gptq_backend.model import Progress, find_structure
from gptq_backend.timing import Recorder, record
from gptq_transformers.streaming import BlockWriter

from .model_shapes import SHAPES


@dataclass(frozen=True)
class Result:
    """Seconds and bytes of quantizing some blocks, and seconds of the whole model computed from them.

    A phase is what ``gptq_backend.timing.timed`` names, and "forward" the rest. The first entry of ``phases`` is what
    comes before the first block, and the next one, with the first block, holds what is done once: compiling kernels,
    allocating.
    """

    shape: str  # of the model
    blocks: int  # so many of its blocks were quantized and written
    all_blocks: int
    dtype: str  # of its weights; on a CPU they are computed in float32
    tokens: int  # to calibrate on
    config: dict[str, Any]
    phases: list[dict[str, float]]  # seconds of each block by phase
    whole: float  # seconds of all blocks: before, first, and the mean of the later ones times their number
    peak_bytes: int | None  # allocated on a GPU; on a CPU resident in the process since its start, model included
    peak_reserved_bytes: int | None  # on a GPU what torch's allocator held at most
    peak_bytes_by_rank: list[int]  # the first of them is that of peak_bytes, as all else is of the first rank
    cpu_seconds_by_rank: list[float]  # of all threads, for all of the run


@dataclass
class _Timed(Events):
    """Cuts a recording into laps where blocks begin and, for the last one, end; writes the blocks."""

    recorder: Recorder
    writer: BlockWriter
    laps: list[dict[str, float]] = field(default_factory=list)

    def cut(self) -> None:
        self.recorder.switch()
        self.laps.append(dict(self.recorder.seconds))
        self.recorder.seconds.clear()

    def block_needed(self, name: str, block: nn.Module) -> None:
        self.cut()

    def block_done(self, name: str, block: nn.Module) -> None:
        self.writer.add(name, block)


def run(
    shape: str,
    config: QuantizeConfig,
    blocks: int,
    samples: int,
    seqlen: int,
    device: torch.device,
    dtype: str = "bf16",
    team: Team | None = None,
) -> Result:
    """Quantize the first ``blocks`` blocks of a model with random weights, on random tokens, and write them.

    All ranks of a ``team`` do it together; by default this process alone.

    Raises:
        GPTQError: fewer than two blocks, from the later ones of which the whole is computed, or more than there are.
    """
    settings, team = SHAPES[shape], team or Team()
    if not 2 <= blocks <= settings["num_hidden_layers"]:
        raise GPTQError(f"blocks={blocks}: expected 2 to {settings['num_hidden_layers']} for the shape {shape}")
    model = build(shape, blocks, dtype, seqlen)
    vocabulary = model.get_input_embeddings().num_embeddings
    tokens = torch.randint(0, vocabulary, (samples, seqlen), generator=torch.Generator().manual_seed(0))
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    with scratch_folder("bench") as folder, record(device) as recorder:
        progress = Progress(Path(folder) / "progress" if team.first else None)
        writer = BlockWriter.of(model, progress, find_structure(model, config))
        assert writer is not None
        events = _Timed(recorder, writer)
        options, begun = RunOptions(device=device), time.process_time()
        quantize_model(model, config, tokens, options=options, events=events, progress=progress, team=team)
        events.cut()
        worked = time.process_time() - begun
    before, first, *later = [sum(lap.values()) for lap in events.laps]
    peak, reserved = _peak(device)
    by_rank = team.all_gather([torch.tensor([peak or 0, worked], dtype=torch.float64)])
    return Result(
        shape=shape,
        blocks=blocks,
        all_blocks=settings["num_hidden_layers"],
        dtype=dtype,
        tokens=tokens.numel(),
        config=config.to_dict(),
        phases=events.laps,
        whole=before + first + sum(later) / len(later) * (settings["num_hidden_layers"] - 1),
        peak_bytes=peak,
        peak_reserved_bytes=reserved,
        peak_bytes_by_rank=[int(each[0]) for (each,) in by_rank],
        cpu_seconds_by_rank=[float(each[1]) for (each,) in by_rank],
    )


def check_settings(config: QuantizeConfig) -> None:
    """Raises GPTQError for those that random weights tell nothing of."""
    if config.preset.trains:
        epochs = f"block_epochs={config.preset.block_epochs}, distill_epochs={config.preset.distill_epochs}"
        raise GPTQError(
            f"{epochs}: bench quantize has random weights, which tell nothing of training; expected 0 of both, as in "
            "quality fast or default"
        )


def launch(ranks: int, arguments: Sequence[str]) -> None:
    """Start as many processes of ``gptq-backend`` with these arguments as torchrun would.

    Raises:
        GPTQError: one of them failed, and has said why.
    """
    # Here: some builds of torch have no distributed.
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=ranks,
        run_id="bench",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "gptq_cli", *arguments)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        raise GPTQError(f"rank {rank} ended with exit code {failure.exitcode}; its message is above") from None


def build(shape: str, blocks: int, dtype: str, positions: int) -> PreTrainedModel:
    """A model with so many of the shape's blocks, on the CPU."""
    settings = SHAPES[shape] | {"num_hidden_layers": blocks, "max_position_embeddings": max(positions, 4096)}
    return AutoModelForCausalLM.from_config(LlamaConfig(**settings), dtype=DTYPES[dtype]).eval()


def _peak(device: torch.device) -> tuple[int | None, int | None]:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device), torch.cuda.max_memory_reserved(device)
    try:
        import resource
    except ImportError:  # Windows
        return None, None
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, None


def lines(result: Result) -> Iterator[str]:
    """For people: seconds by phase and block, and what the whole model takes."""
    titles = ["before", *(f"block {i}" for i in range(len(result.phases) - 1))]
    yield "\nseconds       " + "".join(f"{title:>10}" for title in titles)
    for name in dict.fromkeys(itertools.chain(*result.phases)):
        yield f"{name:<14}" + "".join(f"{lap.get(name, 0):>10.3f}" for lap in result.phases)
    yield f"{'all':<14}" + "".join(f"{sum(lap.values()):>10.3f}" for lap in result.phases)
    yield f"{result.all_blocks} blocks of {result.shape} with {result.tokens} tokens: {result.whole:.1f} s (computed)"
    if result.peak_bytes is not None:
        each = ", ".join(f"{peak / 1e9:.2f}" for peak in result.peak_bytes_by_rank)
        yield f"memory at most {each} GB"
