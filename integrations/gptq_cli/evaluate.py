"""How good is a quantized model: perplexity, and the distance of its predictions to those of a reference model.

Perplexity alone hides differences between methods: it can stay still while the predicted distributions move. The
Kullback-Leibler divergence from the reference sees every such move.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gptq_backend import GPTQError
from gptq_backend.model import split_windows
from gptq_transformers.calibration_input import load_tokenizer

from .formatting import percent, significant, with_error
from .models import model_limits

# Positions whose distributions are compared at once: with 128k words a chunk stays near 128 MB per model.
_ROWS = 256


@dataclass(frozen=True)
class Evaluation:
    """What :func:`evaluate` found. KLD is in nats; its figures are None without a reference."""

    tokens: int  # of the text, in all windows
    windows: int
    seqlen: int  # tokens of a window
    perplexity: float  # of the model
    tokens_per_second: float  # of the windows, over the time of the model's own forward passes
    reference_perplexity: float | None = None
    kld: float | None = None  # mean over all positions of KL(reference || model)
    kld_stderr: float | None = None  # over windows (positions of one are not independent); None for one window
    kld_p99: float | None = None  # 99th percentile over positions
    top1_agreement: float | None = None  # share of positions at which both models find the same token most likely


def cut_windows(text: str, tokenizer: Callable[..., Any], seqlen: int, windows: int) -> Tensor:
    """The first ``windows`` windows of ``seqlen`` tokens of ``text``, fewer if it ends before: int64 [windows, seqlen].

    Each begins with the tokenizer's beginning-of-text token if the whole text does.

    Raises:
        GPTQError: the text is shorter than one window, or the numbers make no sense.
    """
    if seqlen < 2 or windows < 1:
        raise GPTQError(f"seqlen={seqlen} and windows={windows} give nothing to predict; use seqlen >= 2, windows >= 1")
    ids = list(tokenizer(text)["input_ids"])
    found = split_windows(ids, seqlen, tokenizer)[:windows]
    if not found:
        raise GPTQError(
            f"the evaluation text has {len(ids)} tokens, fewer than one window of seqlen={seqlen}; "
            "pass more text or a smaller seqlen"
        )
    return torch.tensor(found, dtype=torch.long)


def evaluate(
    model: nn.Module,
    windows: Tensor | Sequence[Tensor | Sequence[int]],
    reference: nn.Module | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Evaluation:
    """Run ``model``, and ``reference`` beside it, over windows of token ids.

    Args:
        windows: int [W, T], see :func:`cut_windows`.

    Raises:
        GPTQError: the two models have different vocabularies, or one of them yields NaN.
    """
    ids = torch.stack([torch.as_tensor(row) for row in windows]).long()
    check_limits(model, ids)
    if reference is not None:
        check_limits(reference, ids)
    figures: list[dict[str, Any]] = []
    seconds = 0.0
    with torch.inference_mode():
        for done, window in enumerate(ids, 1):
            start = time.perf_counter()
            logits = _logits(model, window)
            seconds += time.perf_counter() - start
            figures.append(_figures(window, logits, None if reference is None else _logits(reference, window)))
            if on_window is not None:
                on_window(done, len(ids))
    return _summarize(figures, seconds, ids)


def _logits(model: nn.Module, window: Tensor) -> Tensor:
    """window: int [T] -> logits [T, V] on the CPU, in the model's dtype."""
    device = next(model.parameters()).device
    logits: Tensor = model(input_ids=window[None].to(device), use_cache=False).logits[0].cpu()
    return logits


def _figures(window: Tensor, logits: Tensor, reference: Tensor | None) -> dict[str, Any]:
    """Of one window: summed negative log-likelihoods; with a reference also KLD [T] and agreement [T] per position.

    window: int [T]; logits and reference: [T, V].
    """
    if reference is not None and reference.shape != logits.shape:
        raise GPTQError(
            f"the model predicts {logits.shape[-1]} tokens and the reference {reference.shape[-1]}; "
            "a reference must have the same vocabulary"
        )
    nll = reference_nll = 0.0
    kld: list[Tensor] = []
    agree: list[Tensor] = []
    for first in range(0, len(window), _ROWS):
        rows = slice(first, first + _ROWS)
        targets = window[first + 1 : first + 1 + _ROWS, None]
        ours = _log_probabilities(logits[rows], "model")
        nll -= ours[: len(targets)].gather(-1, targets).double().sum().item()
        if reference is None:
            continue
        theirs = _log_probabilities(reference[rows], "reference")
        reference_nll -= theirs[: len(targets)].gather(-1, targets).double().sum().item()
        agree.append(ours.argmax(-1) == theirs.argmax(-1))
        # Tokens that the reference rules out (log 0) add nothing, but would make NaN of 0 * inf.
        difference = torch.where(theirs == -math.inf, 0.0, theirs - ours)
        kld.append(theirs.exp().mul_(difference).sum(-1))
    if reference is None:
        return {"nll": nll}
    return {"nll": nll, "reference_nll": reference_nll, "kld": torch.cat(kld), "agree": torch.cat(agree)}


def _log_probabilities(logits: Tensor, which: str) -> Tensor:
    """[T, V] -> float32 [T, V]."""
    result = logits.float().log_softmax(-1)
    if result.isnan().any():
        raise GPTQError(
            f"the {which}'s logits are NaN; its dtype may overflow (try float32), or its checkpoint is damaged"
        )
    return result


def _summarize(figures: Sequence[Mapping[str, Any]], seconds: float, ids: Tensor) -> Evaluation:
    found = {key: [each[key] for each in figures] for key in figures[0]}
    windows, seqlen = ids.shape
    predicted = windows * (seqlen - 1)
    result: dict[str, Any] = {
        "tokens": windows * seqlen,
        "windows": windows,
        "seqlen": seqlen,
        "perplexity": math.exp(min(sum(found["nll"]) / predicted, 700.0)),
        "tokens_per_second": windows * seqlen / seconds,
    }
    if "kld" in found:
        kld = torch.stack(found["kld"]).double()
        result.update(
            reference_perplexity=math.exp(min(sum(found["reference_nll"]) / predicted, 700.0)),
            kld=kld.mean().item(),
            kld_stderr=standard_error(kld.mean(1)),
            kld_p99=float(np.quantile(kld.numpy(), 0.99)),  # torch's refuses more than 16 million values
            top1_agreement=torch.stack(found["agree"]).double().mean().item(),
        )
    return Evaluation(**result)


def standard_error(values: Tensor) -> float | None:
    """Of the mean of values [W] of one window each; None for one window."""
    return (values.std() / len(values) ** 0.5).item() if len(values) > 1 else None


def check_limits(model: nn.Module, ids: Tensor) -> None:
    """Raise GPTQError for windows that the model cannot read, which would end in an index error deep inside it."""
    positions, vocabulary = model_limits(model)
    if ids.shape[1] > positions:
        raise GPTQError(
            f"windows of {ids.shape[1]} tokens exceed the model's {positions} positions; use a smaller seqlen"
        )
    if int(ids.max()) >= vocabulary:
        raise GPTQError(
            f"token id {int(ids.max())} is outside the model's vocabulary of {vocabulary}; "
            "tokenize with the model's own tokenizer"
        )


def check_reference_tokens(
    reference: str, tokenizer: Callable[..., Any], texts: Sequence[str], trust_remote_code: bool
) -> None:
    """Raises GPTQError when the tokenizer of ``reference``, if there is one, gives ``texts`` other ids."""
    try:
        other = load_tokenizer(reference, True, trust_remote_code)
    except GPTQError:  # there is none
        return
    if any(list(tokenizer(text)["input_ids"]) != list(other(text)["input_ids"]) for text in texts):
        raise GPTQError(
            f"the tokenizer of {reference} gives the text other token ids than the model's; a reference must have "
            "the same tokenizer"
        )


def lines(result: Evaluation, dtype: str, device: str) -> Iterator[str]:
    """For people: the figures, one a line."""
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
