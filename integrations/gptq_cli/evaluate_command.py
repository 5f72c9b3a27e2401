"""The work of ``gptq-backend eval``."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

from gptq_backend import GPTQError
from gptq_transformers.calibration_input import load_tokenizer

from . import models, terminal
from .evaluate import Evaluation, cut_windows, evaluate
from .formatting import percent, significant, with_error


def run(
    model: str,
    reference: str | None,
    text: Path,
    *,
    seqlen: int,
    windows: int,
    dtype: str | None,
    device: str,
    backend: str | None,
    trust_remote_code: bool,
    json_target: str | None,
) -> None:
    """Evaluate and print; the arguments are the command's options.

    Raises:
        GPTQError: something cannot be used; the message says what to do.
    """
    console, say = terminal.start(json_target)
    content = terminal.read_text(text)
    for path in filter(None, (model, reference)):
        models.require_model(path)
    models.require_device(device)
    with console.status("loading", spinner="line") as status:
        ids = cut_windows(content, load_tokenizer(model, True, trust_remote_code), seqlen, windows)
        if reference is not None:
            _check_reference_tokens(reference, content, ids.flatten().tolist(), trust_remote_code)
        loaded = models.load_model(model, dtype, device, backend, trust_remote_code=trust_remote_code)
        other = None
        if reference is not None:
            other = models.load_model(reference, dtype, device, trust_remote_code=trust_remote_code)
        result = evaluate(loaded, ids, other, lambda done, total: status.update(f"window {done} of {total}"))
    settings = {"model": model, "reference": reference, "text": str(text), "device": device}
    computed_in = str(next(p for p in loaded.parameters() if p.is_floating_point()).dtype).removeprefix("torch.")
    terminal.write_json(json_target, {**settings, "dtype": computed_in, **dataclasses.asdict(result)})
    say("\n".join(_lines(result, computed_in, device)))


def _check_reference_tokens(reference: str, text: str, ids: list[int], trust_remote_code: bool) -> None:
    """Raises GPTQError when the tokenizer of ``reference``, if there is one, begins ``text`` with other ``ids``."""
    try:
        tokenizer = load_tokenizer(reference, True, trust_remote_code)
    except GPTQError:  # there is none
        return
    if list(tokenizer(text)["input_ids"])[: len(ids)] != ids:
        raise GPTQError(
            f"the tokenizer of {reference} gives the text other token ids than the model's; a reference must have "
            "the same tokenizer"
        )


def _lines(result: Evaluation, dtype: str, device: str) -> Iterator[str]:
    yield f"{result.windows} windows of {result.seqlen} tokens, {dtype} on {device}"
    figures = {"perplexity": f"{result.perplexity:.4f}"}
    if result.kld is not None:
        figures |= {
            "perplexity of the reference": f"{result.reference_perplexity:.4f}",
            "mean KL divergence (nats)": with_error(result.kld, result.kld_stderr),
            "99th percentile of it": significant(result.kld_p99),
            "same most likely token": percent(result.top1_agreement),
        }
    figures["tokens per second"] = f"{result.tokens_per_second:.1f}"
    yield from (f"{name:<28}{figure:>20}" for name, figure in figures.items())
