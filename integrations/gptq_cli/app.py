"""The command line: ``gptq-backend quantize``, ``merge``, ``convert``, ``eval``, ``inspect``, ``tune``: docs/cli.md.

Commands import what they work with when they run: torch and transformers take seconds, help and wrong usage none.
"""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer

from . import bench_commands as bench
from .command_group import CommandGroup
from .options import (
    BatchSize,
    BlockDevice,
    BlockName,
    Device,
    GroupSizes,
    HeadBits,
    Json,
    Out,
    Overwrite,
    Rows,
    Samples,
    Seed,
    Seqlen,
    Shape,
    Shapes,
    TrustRemoteCode,
    names_in_core,
    with_settings,
)  # fmt: skip

app = typer.Typer(name="gptq-backend", cls=CommandGroup, no_args_is_help=True, pretty_exceptions_enable=False)
app.add_typer(bench.app, name="bench")


def _show_version(asked: bool) -> None:
    if not asked:
        return
    typer.echo(f"gptq-backend {names_in_core('version.py')['__version__']}")
    raise typer.Exit


@app.callback()
def _common(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version and exit.")
    ] = False,
) -> None:
    """Make, measure and examine GPTQ checkpoints."""


class Dtype(str, Enum):
    """What a model computes in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
@with_settings
def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or hub name of the original model.", show_default=False)
    ],
    out: Out,
    settings: dict[str, Any],
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|auto",
            help="Text to calibrate on: UTF-8, or .jsonl with a text per line; or auto, which chooses some.",
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="For --calibration auto: text like what the model will read.")
    ] = None,
    rtn: Annotated[bool, typer.Option("--rtn", help="Round to nearest, without calibration.")] = False,
    target_size: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Choose bits per layer for weight files of at most this size, e.g. 800MB or 1.5GiB."
        ),
    ] = None,
    target_bits: Annotated[
        float | None, typer.Option(metavar="BITS", help="Choose bits per layer for so many on average, e.g. 3.6.")
    ] = None,
    samples: Samples = 64,
    seqlen: Seqlen = 512,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    block_name: BlockName = None,
    kld_windows: Annotated[
        int, typer.Option(min=0, help="Compare with MODEL, loaded as a whole, on so many windows not calibrated on.")
    ] = 4,
    device: BlockDevice = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    calibrate_all_experts: Annotated[
        bool,
        typer.Option("--calibrate-all-experts", help="Calibrate each expert on all tokens, also those not sent to it."),
    ] = False,
    overwrite: Overwrite = False,
    resume: Annotated[
        bool, typer.Option("--resume/--no-resume", help="Go on where the same command was interrupted, or begin anew.")
    ] = True,
    json_target: Json = None,
    json_lines: Annotated[
        bool, typer.Option("--json-lines", help="Tell stdout what happens, a JSON object per line, and nothing else.")
    ] = False,
    push_to: Annotated[
        str | None, typer.Option("--push-to", metavar="REPO", help="Then upload OUT to the Hugging Face Hub.")
    ] = None,
) -> None:
    """Quantize MODEL into the folder OUT, which also gets a report (JSON and HTML) and a model card (README.md)."""
    _check_usage(out, settings, calibration, text, rtn)
    _check_budget(target_size, target_bits, rtn)
    if json_lines and json_target == "-":
        raise typer.BadParameter("--json-lines and --json - both write to stdout; --json-lines ends with the result")
    from .quantize_command import Source, run

    source = Source(calibration, text, {"samples": samples, "seqlen": seqlen, "seed": seed})
    options: dict[str, Any] = {"batch_size": batch_size, "block_name": block_name or None}
    options |= {"overwrite": overwrite, "resume": resume, "target_size": target_size, "target_bits": target_bits}
    options["calibrate_all_experts"] = calibrate_all_experts
    targets = json_target, json_lines, push_to
    run(model, Path(out), settings, source, options, kld_windows, device, trust_remote_code, *targets)


def _check_out(out: str) -> None:
    if not out:  # an unset variable of the shell; Path("") would be the current folder
        raise typer.BadParameter("OUT is empty; name the folder to write")


def _check_usage(out: str, settings: dict[str, Any], calibration: str | None, text: Path | None, rtn: bool) -> None:
    """Raises BadParameter for options of ``quantize`` that do not go together."""
    _check_out(out)
    if (calibration is None) != rtn:
        raise typer.BadParameter(
            "pass either --calibration FILE (GPTQ; some 100 kB of text like what the model will read), --calibration "
            "auto (GPTQ on text that it chooses) or --rtn (round to nearest, no text needed, less accurate)"
        )
    if text is not None and calibration != "auto":
        raise typer.BadParameter("--text goes with --calibration auto; for that text alone, pass --calibration FILE")
    if rtn and (settings["quality"] == "best" or settings["block_epochs"] or settings["distill_epochs"]):
        raise typer.BadParameter(
            "--quality best, --block-epochs and --distill-epochs train on calibration text, and --rtn has none; pass "
            "--calibration FILE instead of --rtn, or leave them out"
        )


def _check_budget(target_size: str | None, target_bits: float | None, rtn: bool) -> None:
    """Raises BadParameter for a budget that cannot be."""
    if target_size is not None and target_bits is not None:
        raise typer.BadParameter("--target-size and --target-bits exclude each other; pass one of them")
    if rtn and (target_size is not None or target_bits is not None):
        raise typer.BadParameter(
            "--target-size and --target-bits measure on calibration text, and --rtn has none; pass --calibration FILE "
            "instead of --rtn, or choose --bits yourself"
        )


class Target(str, Enum):
    """What an adapter is merged into."""

    gptq = "gptq"
    bf16 = "bf16"
    fp16 = "fp16"


@app.command()
def merge(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or hub name of a GPTQ checkpoint.", show_default=False)
    ],
    adapter: Annotated[
        Path, typer.Argument(metavar="ADAPTER", help="Folder of an adapter as peft saves it.", show_default=False)
    ],
    out: Out,
    to: Annotated[Target, typer.Option(help="GPTQ again, as each layer is now, or a dense checkpoint.")] = Target.gptq,
    calibration: Annotated[
        str,
        typer.Option(metavar="FILE|auto|none", help="Text to calibrate on, as for quantize; none rounds to nearest."),
    ] = "auto",
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="Text like what the model will read, for auto; or to compare on, for none."),
    ] = None,
    samples: Samples = 64,
    seqlen: Seqlen = 512,
    seed: Seed = 0,
    batch_size: BatchSize = None,
    block_name: BlockName = None,
    kld_windows: Annotated[
        int, typer.Option(min=0, help="Compare with MODEL and ADAPTER on so many windows not calibrated on.")
    ] = 4,
    device: BlockDevice = "cpu",
    trust_remote_code: TrustRemoteCode = False,
    overwrite: Overwrite = False,
    json_target: Json = None,
) -> None:
    """Merge ADAPTER into the quantized MODEL, and write the folder OUT."""
    _check_out(out)
    rounds = to is Target.gptq and calibration != "none"
    if rounds and text is not None and calibration != "auto":
        raise typer.BadParameter("--text goes with --calibration auto or none")
    from .merge_command import Merge
    from .quantize_command import Source

    source = Source(calibration if rounds else None, text, {"samples": samples, "seqlen": seqlen, "seed": seed})
    options = {"batch_size": batch_size, "block_name": block_name or None, "overwrite": overwrite}
    work = Merge(model, adapter, Path(out), to.value, source, kld_windows, device, trust_remote_code)
    work.run(options, json_target)


class Format(str, Enum):
    """What a checkpoint is converted to."""

    gptq = "gptq"
    gptq_v2 = "gptq_v2"
    gptq_p = "gptq_p"
    awq = "awq"
    compressed_tensors = "compressed-tensors"
    bf16 = "bf16"


@app.command()
def convert(
    model: Annotated[
        str,
        typer.Argument(
            metavar="IN", help="Folder or hub name of a quantized model, or a .gguf file.", show_default=False
        ),
    ],
    out: Out,
    to: Annotated[Format, typer.Option(help="The format to write.")] = Format.gptq,
    embed_bits: Annotated[
        int | None,
        typer.Option(
            min=16,
            max=16,
            help="16: write quantized embeddings in 16 bits. Default: as they are.",
            show_default=False,
        ),
    ] = None,
    text: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Also compare the predictions of IN and OUT on this UTF-8 text.")
    ] = None,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens per window of the text.")] = 512,
    windows: Annotated[int, typer.Option(min=1, help="Windows, from the start of the text.")] = 4,
    overwrite: Overwrite = False,
    json_target: Json = None,
) -> None:
    """Write the quantized model IN in another format into the folder OUT, and say what that cost."""
    _check_out(out)
    from .convert_command import run

    run(model, Path(out), to.value, embed_bits, text, seqlen, windows, overwrite, json_target)


@app.command("eval")
def evaluate(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder or name of a model, quantized or not.", show_default=False)
    ],
    reference: Annotated[
        str | None, typer.Option(metavar="REF", help="Model to compare with, usually the original.", show_default=False)
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="UTF-8 text that MODEL was not calibrated on.", show_default=False),
    ] = None,
    seqlen: Annotated[int, typer.Option(min=2, help="Tokens per window.")] = 1024,
    windows: Annotated[int, typer.Option(min=1, help="Windows, from the start of the text.")] = 12,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="What to compute in. Default: float32 on a CPU, else as stored.", show_default=False),
    ] = None,
    device: Device = "cpu",
    backend: Annotated[
        str | None, typer.Option(help="Row of the kernel table. Default: the fastest that fits.", show_default=False)
    ] = None,
    head_bits: HeadBits = None,
    tasks: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Questions with given answers: BIG-bench's task.json, or .jsonl (repeatable).",
            show_default=False,
        ),
    ] = None,
    items: Annotated[int, typer.Option(min=1, help="Questions of each FILE at most, evenly spread.")] = 200,
    robustness: Annotated[
        int | None,
        typer.Option(
            min=1,
            metavar="SWAPS",
            help="Swap so many tokens of each window by gradients, and tell how the loss rises.",
            show_default=False,
        ),
    ] = None,
    trust_remote_code: TrustRemoteCode = False,
    json_target: Json = None,
) -> None:
    """Perplexity of MODEL, its answers, its robustness; with --reference also how far it is from the reference."""
    if text is None and (not tasks or robustness is not None):
        raise typer.BadParameter("pass --text FILE: some 50 kB of UTF-8 text that the model was not calibrated on")
    if robustness is not None and reference is None:
        raise typer.BadParameter("--robustness compares two models; pass --reference REF, usually the original")
    from . import eval_command

    eval_command.run(
        eval_command.Request(
            model=model,
            reference=reference,
            text=text,
            seqlen=seqlen,
            windows=windows,
            tasks=tasks or (),
            items=items,
            robustness=robustness,
            dtype=dtype and dtype.value,
            device=device,
            backend=backend,
            head_bits=head_bits,
            trust_remote_code=trust_remote_code,
        ),
        json_target,
    )


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="Folder of a quantized checkpoint.", show_default=False)],
    device: Annotated[
        list[str] | None, typer.Option(help="Devices to choose kernels for (repeatable). Default: all of this machine.")
    ] = None,
    json_target: Json = None,
) -> None:
    """What is quantized in PATH and how, what is odd about it, and which kernel would serve it. Loads no model."""
    from gptq_backend import CheckpointError

    from . import terminal
    from .inspection import inspect_checkpoint, lines

    _, say = terminal.start(json_target)
    found = inspect_checkpoint(path, device)
    terminal.write_json(json_target, found)
    say("\n".join(lines(found)))
    if found["damaged"]:
        count = len(found["damaged"])
        raise CheckpointError(f"{count} modules cannot be used; the first: {next(iter(found['damaged'].values()))}")


@app.command()
def doctor(
    device: Annotated[
        list[str] | None, typer.Option(help="Devices to check kernels on (repeatable). Default: all of this machine.")
    ] = None,
    seconds: Annotated[
        float, typer.Option(min=1.0, help="After which a kernel counts as hanging, its compilation included.")
    ] = 600.0,
    json_target: Json = None,
) -> None:
    """Run every kernel on every device of this machine, and compare it with plain torch. Needs no model."""
    from .doctor_command import run

    run(device, seconds, json_target)


@app.command()
def tune(
    model: Annotated[
        str | None, typer.Argument(metavar="[MODEL]", help="Folder of a quantized checkpoint.", show_default=False)
    ] = None,
    shape: Shape = None,
    shapes: Shapes = None,
    bits: Annotated[str, typer.Option(metavar="B,...", help="Widths of a code, for the shapes.")] = "4",
    group_size: GroupSizes = "128",
    m: Rows = "1,2,4,8,16,32,64,128,256",
    seconds: Annotated[float, typer.Option(min=0.001, help="Per way to cut a product; there are some thirty.")] = 0.01,
    device: Device = "cuda:0",
    json_target: Json = None,
) -> None:
    """Find the fastest way to cut products on this NVIDIA GPU, and keep it for all later processes of this user."""
    from .tune_command import run

    run(model, shape or [], shapes or [], bits, group_size, m, seconds, device, json_target)
