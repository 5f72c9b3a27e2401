"""The work of ``gptq-backend convert``."""

from __future__ import annotations

import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptq_backend.output_folder import check_spared
from gptq_transformers.calibration_input import load_tokenizer
from gptq_transformers.converting import ConvertReport, convert, is_gguf
from gptq_transformers.errors import load_errors

from . import evaluate, models, terminal
from .formatting import duration, megabytes, significant, with_error
from .report import weights_size

logger = logging.getLogger(__name__)


def run(
    model: str,
    out: Path,
    to: str,
    embed_bits: int | None,
    text: Path | None,
    seqlen: int,
    windows: int,
    overwrite: bool,
    json_target: str | None,
) -> None:
    """Convert, compare and print.

    Raises:
        GPTQError: something cannot be read or held; the message says what to do.
    """
    console, say = terminal.start(json_target)
    content = None
    if text is not None:
        check_spared(out, text, "the text")
        content = terminal.read_text(text)
    if not is_gguf(model):
        models.require_model(model)
    start = time.perf_counter()
    with console.status("converting", spinner="line") as status:
        found = convert(
            model,
            out,
            to,
            embed_bits=embed_bits,
            overwrite=overwrite,
            on_layer=lambda name, done, all: status.update(f"layer {done} of {all}"),
        )
    seconds, evaluation = time.perf_counter() - start, None
    if content is not None:
        with console.status("comparing", spinner="line"):
            evaluation = _compare(model, out, content, seqlen, windows)
    report = _report(model, out, to, found, seconds, evaluation)
    terminal.write_json(json_target, report)
    say("\n".join(_lines(report)))


def _report(
    model: str, out: Path, to: str, found: ConvertReport, seconds: float, evaluation: evaluate.Evaluation | None
) -> dict[str, Any]:
    size = Path(model).stat().st_size if is_gguf(model) else weights_size(model)
    return {
        "model": model,
        "out": str(out),
        "to": to,
        "seconds": seconds,
        "bytes_before": size,
        "bytes_after": weights_size(out),
        "layers": len(found.differences),
        "exact": found.exact,
        "largest_difference": found.largest,
        "largest_difference_of_layers": max(found.differences.values(), default=0.0),
        "relative_difference": found.relative,
        "differences": found.differences,
        "dense": found.dense,
        "notes": found.notes,
        "evaluation": None if evaluation is None else dataclasses.asdict(evaluation),
    }


def _compare(model: str, out: Path, text: str, seqlen: int, windows: int) -> evaluate.Evaluation | None:
    """KL divergence from ``model``; None, with a warning, if it cannot be measured: the checkpoint is complete."""
    try:
        ids = evaluate.cut_windows(text, load_tokenizer(out, True, False), seqlen, windows)
        reference = _load_gguf(Path(model)) if is_gguf(model) else models.load_model(model)
        return evaluate.evaluate(models.load_model(out), ids, reference)
    except Exception as error:
        if (reason := terminal.explain(error)) is None:
            raise
        logger.warning("the checkpoint is complete, but it could not be compared: %s", reason)
        return None


def _load_gguf(file: Path) -> nn.Module:
    from transformers import AutoModelForCausalLM

    with load_errors(file):
        found: nn.Module = AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        ).eval()
        return found


def _lines(report: Mapping[str, Any]) -> Iterator[str]:
    size = megabytes(report["bytes_after"])
    if report["bytes_before"]:
        size = f"{megabytes(report['bytes_before'])} -> {size}"
    yield f"{report['layers']} layers in format {report['to']} in {duration(report['seconds'])}, weights on disk {size}"
    layers = report["largest_difference_of_layers"]
    if layers == 0:
        yield "exact: all weights of the quantized layers are the same numbers"
    else:
        share = significant(100 * report["relative_difference"])
        yield f"largest difference of a weight {significant(layers)} ({share} % of the largest in its layer)"
    for name, difference in report["dense"].items():
        yield f"{name} was rounded to 16 bits, largest difference {significant(difference)}"
    yield from report["notes"]
    if (result := report["evaluation"]) is not None:
        yield (
            f"KL divergence from {report['model']} {with_error(result['kld'], result['kld_stderr'])} "
            f"({result['windows']} windows)"
        )
