"""The command line: ``gptq-backend bench gemm``, ``bench model`` and ``bench quantize``. See docs/cli.md.

As in ``app``, what they work with is imported when they run.
"""

from __future__ import annotations

import dataclasses
import sys
from typing import Annotated, Any

import typer

from .model_shapes import SHAPES
from .options import Device, GroupSizes, HeadBits, Json, Rows, Shape, Shapes, Threads, TrustRemoteCode, with_settings

app = typer.Typer(
    help="Measure speed: of a layer's product, a model's generation, or quantizing.", no_args_is_help=True
)


@app.command("gemm")
def bench_gemm(
    shape: Shape = None,
    shapes: Shapes = None,
    m: Rows = "1,4,16,64,256,1024",
    bits: Annotated[str, typer.Option(metavar="B,...", help="Widths of a code.")] = "4",
    group_size: GroupSizes = "128",
    dtype: Annotated[str, typer.Option(metavar="D,...", help="Of the activations: bf16, fp16, fp32.")] = "bf16",
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Zeros all in the middle, or random ones.")] = True,
    act_order: Annotated[bool, typer.Option("--act-order", help="Groups scattered over the input channels.")] = False,
    backend: Annotated[
        list[str] | None, typer.Option(help="Row of the kernel table (repeatable). Default: what auto selects.")
    ] = None,
    peer: Annotated[
        list[str] | None,
        typer.Option(metavar="MODULE:FUNCTION", help="Also time f(x, q, scales, zeros, group_size) (repeatable)."),
    ] = None,
    in_cache: Annotated[
        bool, typer.Option("--in-cache", help="One copy of each weight: what is left when a small one costs no memory.")
    ] = False,
    seconds: Annotated[float, typer.Option(help="Time per row.")] = 1.0,
    device: Device = "cpu",
    thread_count: Threads = None,
    json_target: Json = None,
) -> None:
    """Time y = x @ W.T of one quantized layer: ours, F.linear, torch's int4 product, peers, and the hardware's roof."""
    import torch

    from gptq_backend.bench import Peer, gemm, threads

    from . import bench_gemm as bench
    from . import models, terminal

    console, say = terminal.start(json_target)
    models.require_device(device)
    asked = bench.problems(bench.read_shapes(shape or [], shapes or []), bits, group_size, dtype, sym, act_order)
    tokens = bench.numbers("--m", m)
    gemm.check_backends(backend or [])
    options = {"backends": backend or [], "peers": [Peer.load(name) for name in peer or []], "seconds": seconds}
    options["copies"] = 1 if in_cache else None
    with threads(thread_count):
        result = bench.run(asked, tokens, torch.device(device), console, say, **options)
    terminal.write_json(json_target, result)


@app.command("model")
def bench_model(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or name of a model, quantized or not.", show_default=False)
    ],
    reference: Annotated[
        str | None, typer.Option(metavar="REF", help="Model to alternate with, usually the original.")
    ] = None,
    peer: Annotated[
        str | None,
        typer.Option(
            metavar="NAME=PROGRAM",
            help="llama.cpp=PROGRAM: take turns with its llama-batched-bench.",
            show_default=False,
        ),
    ] = None,
    peer_model: Annotated[
        str | None, typer.Option(metavar="FILE", help="GGUF file for the peer.", show_default=False)
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt (random ones).")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    dtype: Annotated[str, typer.Option(help="What both compute in: bf16, fp16 or fp32.")] = "bf16",
    backend: Annotated[str | None, typer.Option(help="Row of the kernel table. Default: the fastest.")] = None,
    head_bits: HeadBits = None,
    trust_remote_code: TrustRemoteCode = False,
    compiled: Annotated[bool, typer.Option("--compile", help="Time torch.compile too, beside eager.")] = False,
    profiled: Annotated[bool, typer.Option("--profile", help="Say where the time goes.")] = False,
    repeats: Annotated[int, typer.Option(min=1, help="Repetitions.")] = 5,
    device: Device = "cpu",
    thread_count: Threads = None,
    json_target: Json = None,
) -> None:
    """Tokens per second of MODEL and REF for prefill and decode, through transformers' generate."""
    import torch

    from gptq_backend.bench import DTYPES, gemm, threads

    from . import bench_model as bench
    from . import models, terminal
    from .bench_machine import measure_machine
    from .bench_peer import LlamaCpp

    console, say = terminal.start(json_target)
    terminal.check_choice("--dtype", dtype, DTYPES)
    paths = [path for path in (model, reference) if path is not None]
    for path in paths:
        models.require_model(path)
    models.require_device(device)
    other = None if peer is None else LlamaCpp(peer, peer_model)
    where, name = torch.device(device), str(DTYPES[dtype]).removeprefix("torch.")
    with threads(thread_count):
        result = measure_machine(where, console, say)
        with console.status("generating", spinner="line"):
            loaded = [
                (
                    path,
                    models.load_model(path, name, device, backend, head_bits=bits, trust_remote_code=trust_remote_code),
                )
                for path, bits in zip(paths, (head_bits, None))
            ]
            rows = bench.run(loaded, batch, prompt, new_tokens, repeats, compiled, other)
            result["rows"] = [dataclasses.asdict(row) for row in rows]
            if profiled:
                result["profile"] = {
                    path: bench.profile(each, bench.random_prompt(each, batch, prompt, new_tokens), new_tokens)
                    for path, each in loaded
                }
                result["call_overhead_us"] = gemm.call_overhead(where, dtype, backend)
    terminal.write_json(json_target, result)
    say("\n".join(bench.lines(rows, result.get("profile", {}), result.get("call_overhead_us", {}))))


@app.command("quantize")
@with_settings
def bench_quantize(
    settings: dict[str, Any],
    shape: Annotated[str, typer.Option(help=f"Of the model: {', '.join(SHAPES)}.")] = "llama2-7b",
    blocks: Annotated[int, typer.Option(min=2, help="So many of its blocks are quantized.")] = 2,
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration tokens (random ones).")] = 128,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens per window.")] = 2048,
    dtype: Annotated[str, typer.Option(help="Of the weights: bf16, fp16 or fp32.")] = "bf16",
    ranks: Annotated[int, typer.Option(min=1, help="Processes that quantize together, as under torchrun.")] = 1,
    device: Device = "cpu",
    thread_count: Threads = None,
    json_target: Json = None,
) -> None:
    """Time by phase and memory of quantizing blocks with random weights, and the time of the whole model from it."""
    import torch

    from gptq_backend.bench import DTYPES, machine, threads
    from gptq_backend.distributed import joined, launched

    from . import bench_quantize as bench
    from . import models, terminal
    from .bench_machine import command
    from .quantize_command import read_settings

    if ranks > 1 and not launched():
        bench.launch(ranks, sys.argv[1:])
        return
    with joined(device) as (team, place):
        console, say = terminal.start(json_target, "gptq_backend.kernels.table", quiet=not team.first)
        models.require_device(place)
        terminal.check_choice("--shape", shape, SHAPES)
        terminal.check_choice("--dtype", dtype, DTYPES)
        config = read_settings(settings)
        bench.check_settings(config)
        where = torch.device(place)
        with threads(thread_count), console.status("quantizing", spinner="line"):
            described = machine.describe_machine(where, command())
            result = bench.run(shape, config, blocks, samples, seqlen, where, dtype, team)
    if team.first:
        terminal.write_json(json_target, {"machine": described, **dataclasses.asdict(result)})
        say("\n".join(bench.lines(result)))
