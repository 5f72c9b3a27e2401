"""The work of ``gptq-backend quantize``."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from gptq_backend import GPTQError, QuantizeConfig, QuantizeReport
from gptq_backend.distributed import joined
from gptq_backend.format import EMBEDDINGS
from gptq_backend.model import held_out_windows
from gptq_backend.output_folder import check_spared
from gptq_transformers.calibration_input import load_tokenizer
from gptq_transformers.memory import bytes_of, free_bytes
from gptq_transformers.quantize_pretrained import quantize
from gptq_transformers.streaming import skeleton

from . import evaluate, models, publish, terminal
from .formatting import duration, megabytes, percent, significant, with_error
from .model_card import write_card
from .report import make_report, weights_size, write_reports
from .report_page import places
from .run_progress import RunProgress

logger = logging.getLogger(__name__)

_LARGE_EMBEDDING = 0.1  # share of the result from which on its rounding is recommended
_SHARE = 0.9  # of the free memory may be the two models; activations and logits need some, too


@dataclass(frozen=True)
class Source:
    """Where the calibration text comes from."""

    calibration: str | None  # a file, "auto", or None for round to nearest
    text: Path | None  # for "auto", what the model will read
    window: Mapping[str, Any]  # samples, seqlen and seed

    def read(self) -> tuple[str | list[str] | None, str | list[str] | None]:
        """What to calibrate on ("auto" stays), and what the model will read."""
        texts: str | list[str] | None = self.calibration
        if self.calibration not in (None, "auto"):
            texts = terminal.read_calibration(Path(self.calibration))
        return texts, None if self.text is None else terminal.read_calibration(self.text)

    def describe(self, result: QuantizeReport, choice: Any) -> dict[str, Any] | None:
        """What was calibrated on, for the report; ``choice`` is that of "auto"."""
        if self.calibration is None:
            return None
        tokens = max((layer.tokens for layer in result.layers), default=0)
        used = {"file": str(self.text or self.calibration), **self.window, "tokens": tokens}
        return used if choice is None else {**used, "choice": choice.report()}


def run(
    model: str,
    out: Path,
    settings: Mapping[str, Any],
    source: Source,
    options: Mapping[str, Any],
    kld_windows: int,
    device: str,
    trust_remote_code: bool,
    json_target: str | None,
    json_lines: bool,
    push_to: str | None,
) -> None:
    """Quantize, write the reports, compare and print; the arguments are the command's options.

    Args:
        settings: of ``QuantizeConfig``; ``dynamic`` as JSON.
        options: ``batch_size``, ``block_name``, ``calibrate_all_experts``, ``overwrite``, ``resume``, ``target_size``
            and ``target_bits``.
        push_to: repository on the hub, or None.

    Raises:
        GPTQError: something cannot be used; the message says what to do.
    """
    with joined(device) as (team, place):
        console, _ = terminal.start(json_target, "gptq_backend.kernels.table", quiet=not team.first)  # only packed here
        config = read_settings(settings)
        models.require_model(model)
        models.require_device(place)
        repo = None if push_to is None else publish.check_access(push_to)
        for file in (source.calibration, source.text):
            if file not in (None, "auto"):
                check_spared(out, file, "the text")
        here = out.resolve() if out.is_dir() and out.samefile(".") else None
        texts, own = source.read()
        first = "choosing calibration text" if source.calibration == "auto" else "loading the model"
        progress = RunProgress(console, first, json_lines)
        with progress if team.first else nullcontext():
            result = quantize(  # without the model, whose memory the comparison needs
                model,
                config,
                texts,
                text=own,
                output=out,
                **source.window,
                **options,
                events=progress if team.first else None,
                device=place,
                trust_remote_code=trust_remote_code,
                team=team,
            )[1]
    if not team.first:
        return

    def unseen() -> list[Any]:
        if (choice := progress.choice) is not None:
            return list(choice.held_out[:kld_windows])
        tokenizer = load_tokenizer(out, True, trust_remote_code)
        return held_out_windows(texts or "", tokenizer, **source.window, count=kld_windows)

    if here is not None:  # the folder that this process stood in was replaced; relative paths mean the same again
        os.chdir(here)
    report = make_report(result, model, out, source.describe(result, progress.choice), progress.plan)
    with _reporting(out):
        _, page = write_reports(report, out)  # before the comparison, which can fail
    if source.calibration is not None and kld_windows:
        report["evaluation"] = _compare(out, model, unseen, place, trust_remote_code)
    with _reporting(out):
        write_reports(report, out)
        write_card(report, out, repo, trust_remote_code)
        terminal.write_json(json_target, report)
    progress.result(report)
    if json_target != "-":
        _print(report, page, partial(console.print, soft_wrap=True) if json_lines else terminal.say)
    if repo is not None:
        console.print(f"uploaded: {publish.push(out, repo)}", soft_wrap=True)


@contextmanager
def _reporting(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        reason = terminal.explain(error)
        if reason is None:
            raise
        raise GPTQError(f"the checkpoint in {out} is complete, but a report could not be written: {reason}") from error


def _compare(
    out: Path, model: str, unseen: Callable[[], list[Any]], device: str, trust_remote_code: bool
) -> dict[str, Any] | None:
    """The evaluation of the finished checkpoint on windows that were not calibrated on.

    None, with a warning, if there are none, if memory does not hold both models, or if it fails: the checkpoint is
    complete.
    """
    try:
        windows = unseen()
        if not windows:
            logger.warning("no window of the calibration text was left to measure the KL divergence on")
            return None
        if len(windows[0]) < 2:
            logger.warning("windows of one token predict nothing; the KL divergence was not measured")
            return None
        dtype = _dtype_that_fits(out, model, device, trust_remote_code)
        if dtype is None:
            return None
        options: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
        quantized, original = (models.load_model(path, **options) for path in (out, model))
        found = evaluate.evaluate(quantized, windows, original)
        return {"dtype": dtype, **dataclasses.asdict(found)}
    except Exception as error:
        if (reason := terminal.explain(error)) is None:
            raise
        logger.warning("the checkpoint is complete, but it could not be compared with %s: %s", model, reason)
        return None


def _dtype_that_fits(out: Path, model: str, device: str, trust_remote_code: bool) -> str | None:
    """What both models can be loaded in as a whole: on a CPU float32, where that is fast and exact, or bfloat16 if
    memory is short; elsewhere "auto", as stored. None, with a warning that says how to compare later, if nothing fits.
    """
    where = torch.device(device)
    original, quantized = skeleton(model, trust_remote_code), weights_size(out) or 0
    free, needed = free_bytes(where), 0
    on_cpu = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    for name, dtype in on_cpu.items() if where.type == "cpu" else [("auto", original.dtype)]:
        needed = bytes_of(original, dtype) + quantized * dtype.itemsize // original.dtype.itemsize
        if needed <= _SHARE * free:
            if name == "bfloat16":
                logger.warning("too little memory for float32: the comparison with %s is in bfloat16", model)
            return name
    logger.warning(
        "the checkpoint is complete, but it was not compared with %s: both models take %s of memory, and %s are free; "
        "where there is more, run: gptq-backend eval %s --reference %s --text FILE --dtype bfloat16",
        model,
        megabytes(needed),
        megabytes(free),
        out,
        model,
    )
    return None


def read_settings(settings: Mapping[str, Any]) -> QuantizeConfig:
    """From the options of a command (see options.with_settings); of these, ``dynamic`` is JSON.

    Raises:
        GPTQError: they do not fit together.
    """
    return QuantizeConfig(**{**settings, "dynamic": _parse_rules(settings["dynamic"])})


def _parse_rules(text: str | None) -> dict[str, dict[str, Any]] | None:
    if text is None:
        return None
    try:
        rules = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise GPTQError(f"--dynamic is not valid JSON ({error}); expected {{regex: {{key: value}}}}") from None
    if not isinstance(rules, dict) or not all(isinstance(value, dict) for value in rules.values()):
        raise GPTQError(f"--dynamic is {text}; expected an object of objects: {{regex: {{key: value}}}}")
    return rules


def _embedding_advice(report: Mapping[str, Any]) -> str | None:
    """What to say of an embedding that is left in 16 bits and is much of the result."""
    for name, count in report["kept"].items():
        share = 2 * count / report["bytes_after"]
        if name.rpartition(".")[2] in EMBEDDINGS and share > _LARGE_EMBEDDING:
            return f"{name} is {percent(share)} of the result; --embed-bits 8 halves it, at next to no loss of accuracy"
    return None


def _print(report: dict[str, Any], page: Path, say: Callable[[str], None]) -> None:
    size = megabytes(report["bytes_after"])
    if report["bytes_before"]:
        size = f"{megabytes(report['bytes_before'])} -> {size}"
    say(f"{report['modules']} modules in {duration(report['seconds'])}, weights on disk {size}")
    if (budget := report["budget"]) is not None:
        measured = report["evaluation"] and f", measured {significant(report['evaluation']['kld'])}"
        predicted = f"predicted KL divergence {significant(budget['divergence'])}{measured or ''}"
        say(f"budget of {budget['goal']}: {budget['layer_bits']:.2f} bits per weight of a layer; {predicted}")
    if kept := report["kept"]:
        say(f"stays in 16 bits: {places(kept)}")
    if (advice := _embedding_advice(report)) is not None:
        say(advice)
    if unrouted := report["unrouted"]:
        say(f"{len(unrouted)} layers of experts got no calibration token; see --calibrate-all-experts")
    if blocks := report["blocks"]:
        kept = sum(block["kept"] for block in blocks)
        say(f"training of blocks: {kept} of {len(blocks)} are nearer to the original on held-out text")
    if (found := report["distillation"]) is not None:
        undone = "" if found["kept"] else ", no better and undone"
        change = f"{significant(found['before'])} -> {significant(found['after'])}"
        say(f"distillation: held-out KL divergence {change}{undone}")
    if (found := report["evaluation"]) is not None:
        text = f"{found['windows']} windows of the calibration text that were not used"
        say(f"KL divergence from the original {with_error(found['kld'], found['kld_stderr'])} on {text}")
    say(f"mean error {percent(report['mean_relative_loss'])}, worst in {report['worst_module']}")
    say(f"report: {page}")
