"""The command line: ``gptq-backend quantize``, ``eval`` and ``inspect``. See docs/cli.md."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from gptq_backend import GPTQError, QuantizeConfig

from . import bench_cli, terminal
from .errors import loading
from .report import duration, make_report, megabytes, percent, write_reports

logger = logging.getLogger(__name__)
app = typer.Typer(
    name="gptq-backend",
    cls=terminal.CommandGroup,
    help="Make, measure and examine GPTQ checkpoints.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(bench_cli.app, name="bench")


class Format(str, Enum):
    """``checkpoint_format``."""

    gptq = "gptq"
    gptq_v2 = "gptq_v2"
    gptq_p = "gptq_p"


class Quality(str, Enum):
    """``quality``."""

    fast = "fast"
    default = "default"
    best = "best"


class Dtype(str, Enum):
    """What a model computes in."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


@app.command()
def quantize(
    model: Annotated[str, typer.Argument(help="Folder or hub name of the original model.", show_default=False)],
    out: Annotated[Path, typer.Argument(help="Folder to write; must be new or empty.", show_default=False)],
    bits: Annotated[int, typer.Option(help="Width of a code: 2, 3, 4 or 8.")] = 4,
    group_size: Annotated[int, typer.Option(help="Input channels that share a scale; -1 for all of them.")] = 128,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Symmetric grid, or one with a free zero.")] = True,
    desc_act: Annotated[bool, typer.Option("--desc-act", help="Act-order: a real g_idx in the checkpoint.")] = False,
    static_groups: Annotated[bool, typer.Option("--static-groups", help="Fit grids before the column loop.")] = False,
    act_group_aware: Annotated[
        bool | None,
        typer.Option(help="Act-order that keeps g_idx trivial. Default: unless --desc-act or --static-groups."),
    ] = None,
    damp_percent: Annotated[
        float, typer.Option(help="Damping, as a share of the median of the Hessian's diagonal.")
    ] = 0.15,
    true_sequential: Annotated[bool, typer.Option(help="Layers see inputs from quantized layers.")] = True,
    quality: Annotated[Quality, typer.Option(help="How much work to put into accuracy.")] = Quality.default,
    token_weights: Annotated[
        bool, typer.Option(help="Before attention, count each token by what an error there changes.")
    ] = True,
    scale_search: Annotated[bool, typer.Option(help="Search scales for the least error instead of min-max.")] = True,
    signed_scales: Annotated[
        bool | None,
        typer.Option(help="Allow negative scales; off for readers that insist on positive ones.", show_default=False),
    ] = None,
    search_finalists: Annotated[
        int | None,
        typer.Option(min=1, help="Candidate scales to try with error feedback. Default: by quality."),
    ] = None,
    refine_sweeps: Annotated[
        int | None,
        typer.Option(min=0, help="Refinements of scales and codes after the loop. Default: by quality."),
    ] = None,
    block_epochs: Annotated[
        int | None,
        typer.Option(min=0, help="Passes of training each block's scales and norms. Default: by quality."),
    ] = None,
    distill_epochs: Annotated[
        int | None,
        typer.Option(min=0, help="Passes of training those of the whole model at the end. Default: by quality."),
    ] = None,
    lm_head: Annotated[bool, typer.Option("--lm-head", help="Also quantize the output embedding.")] = False,
    keep_edge_blocks: Annotated[int, typer.Option(help="Leave so many first and last blocks in 16 bits.")] = 0,
    dynamic: Annotated[
        str | None,
        typer.Option(metavar="JSON", help="Per-module rules: {regex: overrides}; '-:regex' skips."),
    ] = None,
    checkpoint_format: Annotated[
        Format, typer.Option("--format", help="How zeros and codes are stored.")
    ] = Format.gptq,
    calibration: Annotated[
        str | None,
        typer.Option(
            metavar="FILE|auto",
            help="Text to calibrate on: UTF-8, or .jsonl with a text per line; or auto, which chooses some.",
        ),
    ] = None,
    text: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="For --calibration auto: text like what the model will read."),
    ] = None,
    rtn: Annotated[bool, typer.Option("--rtn", help="Round to nearest, without calibration.")] = False,
    samples: Annotated[int, typer.Option(min=1, help="Windows of calibration text, for auto at most.")] = 64,
    seqlen: Annotated[int, typer.Option(min=1, help="Tokens per window.")] = 512,
    seed: Annotated[int, typer.Option(min=0, max=2**63 - 1, help="For the choice of windows.")] = 0,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Windows per forward pass.")] = None,
    block_name: Annotated[
        str | None,
        typer.Option(metavar="NAME", help="List of blocks to quantize. Default: the language model's."),
    ] = None,
    kld_windows: Annotated[
        int, typer.Option(min=0, help="Compare with MODEL, loaded as a whole, on so many windows not calibrated on.")
    ] = 4,
    device: Annotated[str, typer.Option(help="Where to compute, a block at a time, e.g. cpu or cuda:0.")] = "cpu",
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace OUT if it holds something.")] = False,
    json_target: terminal.Json = None,
) -> None:
    """Quantize MODEL into the folder OUT, which also gets a report (JSON and HTML)."""
    if (calibration is None) != rtn:
        raise typer.BadParameter(
            "pass either --calibration FILE (GPTQ; some 100 kB of text like what the model will read), --calibration "
            "auto (GPTQ on text that it chooses) or --rtn (round to nearest, no text needed, less accurate)"
        )
    if text is not None and calibration != "auto":
        raise typer.BadParameter("--text goes with --calibration auto; for that text alone, pass --calibration FILE")
    if rtn and (quality is Quality.best or block_epochs or distill_epochs):
        raise typer.BadParameter(
            "--quality best, --block-epochs and --distill-epochs train on calibration text, and --rtn has none; pass "
            "--calibration FILE instead of --rtn, or leave them out"
        )
    config = QuantizeConfig(
        bits=bits,
        group_size=group_size,
        sym=sym,
        desc_act=desc_act,
        static_groups=static_groups,
        act_group_aware=act_group_aware,
        damp_percent=damp_percent,
        true_sequential=true_sequential,
        quality=quality.value,
        token_weights=token_weights,
        scale_search=scale_search,
        signed_scales=signed_scales,
        search_finalists=search_finalists,
        refine_sweeps=refine_sweeps,
        block_epochs=block_epochs,
        distill_epochs=distill_epochs,
        lm_head=lm_head,
        keep_edge_blocks=keep_edge_blocks,
        dynamic=_parse_rules(dynamic),
        checkpoint_format=checkpoint_format.value,
    )
    window = {"samples": samples, "seqlen": seqlen, "seed": seed}
    source = (calibration, text)
    _run_quantize(
        model, out, config, source, window, batch_size, kld_windows, device, overwrite, json_target, block_name
    )


def _run_quantize(
    model: str,
    out: Path,
    config: QuantizeConfig,
    source: tuple[str | None, Path | None],
    window: dict[str, int],
    batch_size: int | None,
    kld_windows: int,
    device: str,
    overwrite: bool,
    json_target: str | None,
    block_name: str | None,
) -> None:
    from gptq_backend.calibration import set_aside

    from .api import quantize as run
    from .evaluate import require_device, require_model

    console = terminal.stderr_console()
    terminal.set_up_logging(console, ignore="gptq_backend.kernels")  # the layers only get packed here
    terminal.check_json_target(json_target)
    require_model(model)
    require_device(device)
    here = out.resolve() if out.is_dir() and out.samefile(".") else None
    calibration, text = source
    texts: str | list[str] | None = calibration
    if calibration not in (None, "auto"):
        texts = terminal.read_calibration(Path(calibration))
    own = None if text is None else terminal.read_calibration(text)

    def unseen() -> list[Any]:
        if (choice := progress.choice) is not None:
            return list(choice.held_out[:kld_windows])
        return set_aside(texts, _tokenizer(str(out)), **window, count=kld_windows)

    first = "choosing calibration text" if calibration == "auto" else "loading the model"
    with terminal.LayerProgress(console, first) as progress:
        result = run(  # without the model, whose memory the comparison needs
            model,
            config,
            texts,
            text=own,
            output=out,
            **window,
            batch_size=batch_size,
            overwrite=overwrite,
            on_layer=progress.on_layer,
            on_step=progress.on_step,
            on_choice=progress.on_choice,
            device=device,
            block_name=block_name,
        )[1]
    if here is not None:  # the folder that this process stood in was replaced; relative paths mean the same again
        os.chdir(here)
    used = None
    if calibration is not None:
        tokens = max((layer.tokens for layer in result.layers), default=0)
        used = {"file": str(text or calibration), **window, "tokens": tokens}
        if progress.choice is not None:
            used["choice"] = progress.choice.report()
    report = make_report(result, model, out, used)
    with _reporting(out):
        _, page = write_reports(report, out)  # before the comparison, which can fail
    if calibration is not None and kld_windows:
        report["evaluation"] = _compare(out, model, unseen, device)
    with _reporting(out):
        write_reports(report, out)
        terminal.write_json(json_target, report)
    if json_target != "-":
        _print_quantized(report, page)


@contextmanager
def _reporting(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = terminal.explain(error)
        if reason is None:
            raise
        raise GPTQError(f"the checkpoint in {out} is complete, but a report could not be written: {reason}") from error


def _compare(out: Path, model: str, unseen: Callable[[], list[Any]], device: str) -> dict[str, Any] | None:
    """The evaluation of the finished checkpoint on windows that were not calibrated on.

    None, with a warning, if there are none or it fails, for want of memory say: the checkpoint is complete.
    """
    from .evaluate import evaluate as run
    from .evaluate import load_model

    try:
        windows = unseen()
        if not windows:
            logger.warning("no window of the calibration text was left to measure the KL divergence on")
            return None
        if len(windows[0]) < 2:
            logger.warning("windows of one token predict nothing; the KL divergence was not measured")
            return None
        return dataclasses.asdict(run(load_model(out, device=device), windows, load_model(model, device=device)))
    except Exception as error:
        if (reason := terminal.explain(error)) is None:
            raise
        logger.warning("the checkpoint is complete, but it could not be compared with %s: %s", model, reason)
        return None


def _parse_rules(text: str | None) -> dict[str, dict[str, Any]] | None:
    if text is None:
        return None
    try:
        rules = json.loads(text)
    except ValueError as error:
        raise GPTQError(f"--dynamic is not valid JSON ({error}); expected {{regex: {{key: value}}}}") from None
    if not isinstance(rules, dict) or not all(isinstance(value, dict) for value in rules.values()):
        raise GPTQError(f"--dynamic is {text}; expected an object of objects: {{regex: {{key: value}}}}")
    return rules


def _print_quantized(report: dict[str, Any], page: Path) -> None:
    size = megabytes(report["bytes_after"])
    if report["bytes_before"]:
        size = f"{megabytes(report['bytes_before'])} -> {size}"
    typer.echo(f"{report['modules']} modules in {duration(report['seconds'])}, weights on disk {size}")
    if blocks := report["blocks"]:
        kept = sum(block["kept"] for block in blocks)
        typer.echo(f"training of blocks: {kept} of {len(blocks)} are nearer to the original on held-out text")
    if (found := report["distillation"]) is not None:
        undone = "" if found["kept"] else ", no better and undone"
        typer.echo(f"distillation: held-out KL divergence {found['before']:.4f} -> {found['after']:.4f}{undone}")
    if (found := report["evaluation"]) is not None:
        error = "" if found["kld_stderr"] is None else f" ± {found['kld_stderr']:.4f}"
        text = f"{found['windows']} windows of the calibration text that were not used"
        typer.echo(f"KL divergence from the original {found['kld']:.4f}{error} on {text}")
    typer.echo(f"mean error {percent(report['mean_relative_loss'])}, worst in {report['worst_module']}")
    typer.echo(f"report: {page}")


@app.command("eval")
def evaluate(
    model: Annotated[str, typer.Argument(help="Folder or name of a model, quantized or not.", show_default=False)],
    reference: Annotated[
        str | None,
        typer.Option(metavar="REF", help="Model to compare with, usually the original.", show_default=False),
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
    device: Annotated[str, typer.Option(help="Where to run, e.g. cpu or cuda:0.")] = "cpu",
    backend: Annotated[
        str | None,
        typer.Option(help="Row of the kernel table. Default: the fastest that fits.", show_default=False),
    ] = None,
    json_target: terminal.Json = None,
) -> None:
    """Perplexity of MODEL; with --reference also how far its predictions are from the reference's."""
    if text is None:
        raise typer.BadParameter("pass --text FILE: some 50 kB of UTF-8 text that the model was not calibrated on")
    from .evaluate import cut_windows, load_model, require_device, require_model
    from .evaluate import evaluate as run

    console = terminal.stderr_console()
    terminal.set_up_logging(console)
    terminal.check_json_target(json_target)
    content = terminal.read_text(text)
    for path in filter(None, (model, reference)):
        require_model(path)
    require_device(device)
    chosen = dtype.value if dtype else None
    with console.status("loading", spinner="line") as status:
        ids = cut_windows(content, _tokenizer(model), seqlen, windows)
        if reference is not None:
            _check_reference_tokens(reference, content, ids.flatten().tolist())
        loaded = load_model(model, chosen, device, backend)
        other = None if reference is None else load_model(reference, chosen, device)
        result = run(loaded, ids, other, lambda done, total: status.update(f"window {done} of {total}"))
    settings = {"model": model, "reference": reference, "text": str(text), "device": device}
    computed_in = str(next(p for p in loaded.parameters() if p.is_floating_point()).dtype).removeprefix("torch.")
    terminal.write_json(json_target, {**settings, "dtype": computed_in, **dataclasses.asdict(result)})
    if json_target != "-":
        _print_evaluation(result, settings, computed_in)


def _tokenizer(path: str) -> Any:
    from transformers import AutoTokenizer

    with loading(path):
        tokenizer = AutoTokenizer.from_pretrained(path)
    if len(tokenizer) <= len(tokenizer.all_special_tokens):  # made up by transformers 5 where the files are missing
        raise GPTQError(f"{path} has no tokenizer; put the files of the original model's there")
    return tokenizer


def _check_reference_tokens(reference: str, text: str, ids: list[int]) -> None:
    """Raises GPTQError when the tokenizer of ``reference``, if there is one, begins ``text`` with other ``ids``."""
    try:
        tokenizer = _tokenizer(reference)
    except Exception:  # transformers raises most kinds where there is none
        return
    if list(tokenizer(text)["input_ids"])[: len(ids)] != ids:
        raise GPTQError(
            f"the tokenizer of {reference} gives the text other token ids than the model's; a reference must have "
            "the same tokenizer"
        )


def _print_evaluation(result: Any, settings: dict[str, Any], dtype: str) -> None:
    table = Table(
        title=f"{result.windows} windows of {result.seqlen} tokens, {dtype} on {settings['device']}", show_header=False
    )
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_row("perplexity", f"{result.perplexity:.4f}")
    if result.kld is not None:
        error = "" if result.kld_stderr is None else f" ± {result.kld_stderr:.5f}"
        table.add_row("perplexity of the reference", f"{result.reference_perplexity:.4f}")
        table.add_row("mean KL divergence (nats)", f"{result.kld:.5f}{error}")
        table.add_row("99th percentile of it", f"{result.kld_p99:.4f}")
        table.add_row("same most likely token", percent(result.top1_agreement))
    table.add_row("tokens per second", f"{result.tokens_per_second:.1f}")
    Console(highlight=False).print(table)


@app.command()
def inspect(
    path: Annotated[Path, typer.Argument(help="Folder of a quantized checkpoint.", show_default=False)],
    device: Annotated[
        list[str] | None,
        typer.Option(help="Devices to choose kernels for (repeatable). Default: all of this machine."),
    ] = None,
    json_target: terminal.Json = None,
) -> None:
    """What is quantized in PATH and how, what is odd about it, and which kernel would serve it. Loads no model."""
    from .inspection import inspect_checkpoint, print_inspection

    terminal.set_up_logging(terminal.stderr_console())
    terminal.check_json_target(json_target)
    found = inspect_checkpoint(path, device)
    terminal.write_json(json_target, found)
    if json_target != "-":
        print_inspection(found, Console(highlight=False))
    if found["damaged"]:
        count = len(found["damaged"])
        raise GPTQError(f"{count} modules cannot be used; the first: {next(iter(found['damaged'].values()))}")


if __name__ == "__main__":
    app()
