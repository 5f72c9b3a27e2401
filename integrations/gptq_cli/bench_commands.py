"""The command line: ``gptq-backend bench gemm``, ``bench model`` and ``bench quantize``. See docs/cli.md.

As in ``app``, what they work with is imported when they run.
"""

from __future__ import annotations

import dataclasses
import itertools
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .options import Device, Json, TrustRemoteCode

if TYPE_CHECKING:
    import torch

    from gptq_backend.bench import Problem, Row

app = typer.Typer(
    help="Measure speed: of a layer's product, a model's generation, or quantizing.", no_args_is_help=True
)

Threads = Annotated[int | None, typer.Option("--threads", min=1, help="CPU threads. Default: torch's.")]


@app.command("gemm")
def bench_gemm(
    shape: Annotated[
        list[str] | None, typer.Option(metavar="NxK", help="Output and input features (repeatable).")
    ] = None,
    shapes: Annotated[
        list[str] | None, typer.Option(metavar="LIST", help="Layers of a model, e.g. llama2-7b, or all.")
    ] = None,
    m: Annotated[str, typer.Option("--m", metavar="M,...", help="Rows of activations.")] = "1,4,16,64,256,1024",
    bits: Annotated[str, typer.Option(metavar="B,...", help="Widths of a code.")] = "4",
    group_size: Annotated[str, typer.Option(metavar="G,...", help="Channels that share a scale; -1 for all.")] = "128",
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

    from gptq_backend.bench import Peer, Problem, gemm, machine, threads

    from . import terminal
    from .evaluate import require_device

    console = terminal.stderr_console()
    terminal.set_up_logging(console)
    terminal.check_json_target(json_target)
    require_device(device)
    problems = [
        Problem(n, k, b, k if g == -1 else min(g, k), sym, act_order, d)
        for (n, k), b, g, d in itertools.product(
            _shapes(shape, shapes),
            _numbers("--bits", bits, (2, 3, 4, 8)),
            _numbers("--group-size", group_size),
            _dtypes(dtype),
        )
    ]
    tokens = _numbers("--m", m)
    gemm.check_backends(backend or [])
    peers = [Peer.load(name) for name in peer or []]
    where, rows, copies = torch.device(device), [], 1 if in_cache else None
    with threads(thread_count):
        result = _measure_machine(where, json_target, console)
        for problem in problems:
            if json_target != "-":
                typer.echo(_gemm_heading(problem))
            done = gemm.run(problem, tokens, result["ceilings"], where, backend or [], peers, seconds, copies)
            for count in tokens:
                with console.status(f"{problem.N}x{problem.K}, M={count}", spinner="line"):
                    found = next(done)
                rows += found
                if json_target != "-":
                    typer.echo("\n".join(map(_gemm_line, found)))
        after = max(machine.read_gbps(where).values())
    result["ceilings"]["read_gbps_after"] = after
    if json_target != "-":
        typer.echo(f"\nreads {after:.1f} GB/s after all that")
    terminal.write_json(json_target, {**result, "rows": [dataclasses.asdict(row) for row in rows]})


def _measure_machine(device: torch.device, json_target: str | None, console: Any) -> dict[str, Any]:
    """``machine`` and ``ceilings`` of a result, which are printed too."""
    from gptq_backend.bench import machine

    described = machine.describe_machine(device, shlex.join(["gptq-backend", *sys.argv[1:]]))
    with console.status("ceilings", spinner="line"):
        ceilings = machine.measure_ceilings(device)
    if json_target != "-":
        name = described["accelerator"] or f"{described['cpu']}, {described['threads']} threads"
        one = ceilings.get("read_gbps_1_thread")
        typer.echo(f"{name}; torch {described['torch']}, gptq_backend {described['gptq_backend']}")
        typer.echo(
            f"reads {ceilings['read_gbps']:.1f} GB/s{f' (1 thread {one:.1f})' if one else ''}, "
            f"multiplies {ceilings['peak_gflops']:.0f} GFLOP/s ({ceilings['peak_from']})"
        )
    return {"machine": described, "ceilings": ceilings}


def _gemm_heading(problem: Problem) -> str:
    grid = ("sym" if problem.sym else "asym") + (", act-order" if problem.act_order else "")
    title = f"\n{problem.N}x{problem.K}, {problem.bits} bits, group {problem.group_size}, {grid}, {problem.dtype}\n"
    return title + f"{'M':>5}  {'kernel':<28}{'us':>10}{'+-':>6}{'GB/s':>8}{'roof':>7}{'x linear':>10}{'error':>10}"


def _gemm_line(row: Row) -> str:
    start = f"{row.M:>5}  {row.kernel:<28}"
    if row.us is None or row.spread is None:
        return f"{start}  {row.reason}"
    half = (row.spread[1] - row.spread[0]) / 2 / row.us
    ratio = "" if row.ratio_bf16 is None else f"{row.ratio_bf16:.2f}"
    error = "" if row.error is None else f"{row.error:.1e}"
    return f"{start}{row.us:>10.1f}{half:>6.0%}{row.gbps:>8.2f}{row.roof_share:>7.0%}{ratio:>10}{error:>10}"


def _shapes(shape: Sequence[str] | None, lists: Sequence[str] | None) -> list[tuple[int, int]]:
    from gptq_backend import ConfigError
    from gptq_backend.bench import gemm

    found = []
    for text in shape or []:
        n, _, k = text.lower().partition("x")
        if not (n.isdecimal() and k.isdecimal() and int(n) and int(k)):
            raise ConfigError(f"--shape {text} is not NxK, e.g. 11008x4096 for 4096 input features")
        found.append((int(n), int(k)))
    for name in lists or []:
        if name != "all" and name not in gemm.SHAPES:
            raise ConfigError(f"--shapes {name} is not known; choose all or one of {list(gemm.SHAPES)}")
        found += itertools.chain(*gemm.SHAPES.values()) if name == "all" else gemm.SHAPES[name]
    return list(dict.fromkeys(found)) or gemm.DEFAULT_SHAPES


def _numbers(option: str, text: str, allowed: Sequence[int] = ()) -> list[int]:
    from gptq_backend import ConfigError

    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError:
        numbers = [0]
    wrong = [number for number in numbers if (number not in allowed if allowed else number < 1)]
    if wrong and not (option == "--group-size" and set(wrong) == {-1}):
        raise ConfigError(f"{option} {text}: expected {allowed or 'positive numbers'}, separated by commas")
    return numbers


def _dtypes(text: str) -> list[str]:
    from gptq_backend import ConfigError
    from gptq_backend.bench import DTYPES

    for name in text.split(","):
        if name not in DTYPES:
            raise ConfigError(f"--dtype {text}: expected {', '.join(DTYPES)}, separated by commas")
    return text.split(",")


@app.command("model")
def bench_model(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or name of a model, quantized or not.", show_default=False)
    ],
    reference: Annotated[
        str | None, typer.Option(metavar="REF", help="Model to alternate with, usually the original.")
    ] = None,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt (random ones).")] = 128,
    new_tokens: Annotated[int, typer.Option(min=2, help="Tokens to generate.")] = 32,
    batch: Annotated[int, typer.Option(min=1, help="Prompts at a time.")] = 1,
    dtype: Annotated[str, typer.Option(help="What both compute in: bf16, fp16 or fp32.")] = "bf16",
    backend: Annotated[str | None, typer.Option(help="Row of the kernel table. Default: the fastest.")] = None,
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

    from gptq_backend import ConfigError
    from gptq_backend.bench import DTYPES, gemm, threads

    from . import bench_model as bench
    from . import terminal
    from .evaluate import load_model, require_device, require_model

    console = terminal.stderr_console()
    terminal.set_up_logging(console)
    terminal.check_json_target(json_target)
    if dtype not in DTYPES:
        raise ConfigError(f"--dtype {dtype}: expected one of {', '.join(DTYPES)}")
    paths = [path for path in (model, reference) if path is not None]
    for path in paths:
        require_model(path)
    require_device(device)
    where, models = torch.device(device), []
    with threads(thread_count):
        result = _measure_machine(where, json_target, console)
        with console.status("generating", spinner="line"):
            for path in paths:
                name = str(DTYPES[dtype]).removeprefix("torch.")
                loaded = load_model(path, name, device, backend, trust_remote_code=trust_remote_code)
                models.append((path, loaded))
            rows = bench.run(models, batch, prompt, new_tokens, repeats, compiled)
            result["rows"] = [dataclasses.asdict(row) for row in rows]
            if profiled:
                ids = [bench.random_prompt(loaded, batch, prompt, new_tokens) for _, loaded in models]
                result["profile"] = {
                    path: bench.profile(loaded, each, new_tokens) for (path, loaded), each in zip(models, ids)
                }
                result["call_overhead_us"] = gemm.call_overhead(where, dtype, backend)
    terminal.write_json(json_target, result)
    if json_target != "-":
        _print_model(rows, result)


def _print_model(rows: Sequence[Any], result: dict[str, Any]) -> None:
    width = max(len(row.model) for row in rows) + 2
    typer.echo(
        f"\n{'model':<{width}}{'mode':<10}{'phase':<9}{'tokens/s':>10}{'quartiles':>20}{'ms/step':>10}{'x ref':>8}"
    )
    for row in rows:
        mode = "compiled" if row.compiled else "eager"
        ratio = "" if row.ratio is None else f"{row.ratio:.2f}"
        spread = f"{row.spread[0]:.1f}-{row.spread[1]:.1f}"
        typer.echo(
            f"{row.model:<{width}}{mode:<10}{row.phase:<9}{row.tokens_per_second:>10.1f}{spread:>20}"
            f"{row.ms_per_step:>10.2f}{ratio:>8}"
        )
    for path, phases in result.get("profile", {}).items():
        for phase, kinds in phases.items():
            parts = [
                f"{kind} {part['share']:.0%} ({part['ms_per_step']:.2f} ms, {part['calls_per_step']:.0f} calls)"
                for kind, part in kinds.items()
            ]
            typer.echo(f"{path}, {phase}, per step: {'; '.join(parts)}")
    if overhead := result.get("call_overhead_us"):
        typer.echo("a call on a 16x16 layer: " + ", ".join(f"{name} {us:.1f} us" for name, us in overhead.items()))


@app.command("quantize")
def bench_quantize(
    shape: Annotated[
        str, typer.Option(help="Of the model: llama2-7b, llama2-70b, smollm2-135m or tiny.")
    ] = "llama2-7b",
    blocks: Annotated[int, typer.Option(min=2, help="So many of its blocks are quantized.")] = 2,
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration tokens (random ones).")] = 128,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens per window.")] = 2048,
    bits: Annotated[int, typer.Option(help="Width of a code: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Input channels that share a scale; -1 for all of them.")] = 128,
    quality: Annotated[str, typer.Option(help="fast or default; best needs a real model.")] = "default",
    dtype: Annotated[str, typer.Option(help="Of the weights: bf16, fp16 or fp32.")] = "bf16",
    device: Device = "cpu",
    thread_count: Threads = None,
    json_target: Json = None,
) -> None:
    """Time by phase and memory of quantizing blocks with random weights, and the time of the whole model from it."""
    import torch

    from gptq_backend import ConfigError, QuantizeConfig
    from gptq_backend.bench import DTYPES, machine, threads

    from . import bench_quantize as bench
    from . import terminal
    from .evaluate import require_device
    from .model_shapes import SHAPES

    console = terminal.stderr_console()
    terminal.set_up_logging(console, ignore="gptq_backend.kernels.table")
    terminal.check_json_target(json_target)
    require_device(device)
    if shape not in SHAPES or dtype not in DTYPES or quality not in ("fast", "default"):
        raise ConfigError(
            f"--shape {shape} --dtype {dtype} --quality {quality}: expected one of {', '.join(SHAPES)}; of "
            f"{', '.join(DTYPES)}; and of fast, default"
        )
    config = QuantizeConfig(bits=bits, group_size=group_size, quality=quality)
    where = torch.device(device)
    with threads(thread_count), console.status("quantizing", spinner="line"):
        described = machine.describe_machine(where, shlex.join(["gptq-backend", *sys.argv[1:]]))
        result = bench.run(shape, config, blocks, samples, seqlen, where, dtype)
    terminal.write_json(json_target, {"machine": described, **dataclasses.asdict(result)})
    if json_target != "-":
        _print_quantize(result)


def _print_quantize(result: Any) -> None:
    names = list(dict.fromkeys(itertools.chain(*result.phases)))
    titles = ["before", *(f"block {i}" for i in range(len(result.phases) - 1))]
    typer.echo("\nseconds       " + "".join(f"{title:>10}" for title in titles))
    for name in names:
        typer.echo(f"{name:<14}" + "".join(f"{lap.get(name, 0):>10.3f}" for lap in result.phases))
    typer.echo(f"{'all':<14}" + "".join(f"{sum(lap.values()):>10.3f}" for lap in result.phases))
    typer.echo(
        f"{result.all_blocks} blocks of {result.shape} with {result.tokens} tokens: {result.whole:.1f} s (computed)"
    )
    if result.peak_bytes is not None:
        typer.echo(f"memory at most {result.peak_bytes / 1e9:.2f} GB")
