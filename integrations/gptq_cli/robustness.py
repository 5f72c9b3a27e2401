"""How easily is a model misled: by how much do a few swapped tokens raise its loss on the text behind them?

The swaps are chosen by gradients, as HotFlip (arXiv 1712.06751) and its successors do. Those found on the model and
those found on the reference are tried on both, because an attack that only works on the model that it was found on says
something else than one that also works on the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from gptq_backend import GPTQError

from .evaluate import check_limits, standard_error
from .formatting import significant, with_error

_CANDIDATES = 32  # swaps that look best by the gradient and are tried
_TOKENS = 2048  # that go through a model at once: their logits are large


@dataclass(frozen=True)
class Robustness:
    """Mean loss in nats per token of the second halves of windows, before and after swaps in the first halves.

    A rise is that of the loss by the swaps; the standard errors are over windows.
    """

    windows: int
    seqlen: int
    swaps: int
    loss: float  # of the model, before
    reference_loss: float
    rise: float  # of the model's loss, by the swaps found on the model
    rise_stderr: float | None
    reference_rise: float  # of the reference's loss, by those found on the reference
    reference_rise_stderr: float | None
    difference: float  # of the two, paired by window
    difference_stderr: float | None
    transferred: float  # rise of the model's loss by the swaps found on the reference
    transferred_back: float  # rise of the reference's loss by those found on the model


def check_room(seqlen: int, swaps: int) -> None:
    """Raises GPTQError for more swaps than the first half of a window has places for, but the first."""
    most = seqlen // 2 - 1
    if not 0 < swaps <= most:
        room = f"room for 1 to {most} swaps" if most > 0 else "no room for a swap"
        raise GPTQError(f"robustness={swaps}: windows of {seqlen} tokens have {room}")


def measure(
    model: nn.Module,
    reference: nn.Module,
    windows: Tensor,
    swaps: int,
    excluded: Sequence[int] = (),
    on_window: Callable[[int, int], None] | None = None,
) -> Robustness:
    """Attack both models on the same windows.

    Args:
        windows: int64 [W, T].
        swaps: tokens to swap in each window, one after another.
        excluded: tokens that none is swapped for, such as those that begin and end texts.

    Raises:
        GPTQError: a window is too short for so many swaps or too long for a model, or a loss is not finite, or no token
            is left to swap in.
    """
    check_room(windows.shape[1], swaps)
    models = {"model": model, "reference": reference}
    tables = {who: all_embeddings(each) for who, each in models.items()}
    rows: dict[str, list[float]] = {f"{who} {swapped}": [] for who in models for swapped in ("none", *models)}
    for each in models.values():
        check_limits(each, windows)
    for done, window in enumerate(windows, 1):
        found = {"none": window}
        found |= {who: attack(each, tables[who], window, swaps, excluded) for who, each in models.items()}
        for who, each in models.items():
            for swapped, ids in found.items():
                rows[f"{who} {swapped}"].append(losses(each, ids[None]).item())
        if on_window is not None:
            on_window(done, len(windows))
    return _summarize({key: torch.tensor(values).double() for key, values in rows.items()}, windows.shape, swaps)


def attack(model: nn.Module, embeddings: Tensor, window: Tensor, swaps: int, excluded: Sequence[int] = ()) -> Tensor:
    """``window`` int64 [T] with ``swaps`` tokens of its first half but the first replaced, greedily by gradients, by
    tokens that are not ``excluded``. ``embeddings``: of :func:`all_embeddings`.
    """
    window = window.clone()
    used: list[int] = [0]  # the beginning-of-text token, where there is one
    for _ in range(swaps):
        scores = _gains(model, embeddings, window)  # [T // 2, V]
        scores[used] = -math.inf
        scores[:, [token for token in excluded if token < scores.shape[1]]] = -math.inf
        possible = int(scores.isfinite().sum())
        if not possible:
            raise GPTQError("no token is left to swap in: all are special ones, or no derivative is finite")
        best = scores.flatten().topk(min(_CANDIDATES, possible)).indices
        places, tokens = best // scores.shape[1], best % scores.shape[1]
        tried = window.repeat(len(best), 1)
        tried[torch.arange(len(best)), places] = tokens
        winner = int(losses(model, tried).argmax())
        window = tried[winner]
        used.append(int(places[winner]))
    return window


def losses(model: nn.Module, ids: Tensor) -> Tensor:
    """Mean negative log-likelihood of the second halves of windows int64 [B, T] -> float32 [B] on the CPU."""
    with torch.inference_mode():
        parts = ids.to(next(model.parameters()).device).split(max(1, _TOKENS // ids.shape[1]))
        found = torch.cat([_losses(model, part, input_ids=part).cpu() for part in parts])
    if not found.isfinite().all():
        raise GPTQError("a loss is not finite; the dtype may overflow (try float32), or a checkpoint is damaged")
    return found


@torch.no_grad()
def all_embeddings(model: nn.Module) -> Tensor:
    """Of all tokens, whatever the table is made of: float32 [V, D]."""
    table = model.get_input_embeddings()  # type: ignore[operator]
    rows: Tensor = table(torch.arange(table.num_embeddings, device=next(model.parameters()).device))
    return rows.float()


def _gains(model: nn.Module, embeddings: Tensor, window: Tensor) -> Tensor:
    """By how much each swap in the first half would raise the loss if it were linear: [T // 2, V] on the CPU."""
    half = len(window) // 2
    with torch.no_grad():
        x = model.get_input_embeddings()(window.to(embeddings.device)[None])  # type: ignore[operator]
    with torch.enable_grad():
        x = x.requires_grad_()
        (gradient,) = torch.autograd.grad(_losses(model, window[None], inputs_embeds=x).sum(), x)
    gradient = gradient[0, :half].float()
    now = (gradient * x.detach()[0, :half].float()).sum(-1, keepdim=True)
    return (gradient @ embeddings.T - now).cpu()


def _losses(model: nn.Module, ids: Tensor, **inputs: Tensor) -> Tensor:
    """Of windows int64 [B, T] that the model is given as ``inputs`` -> [B]."""
    half = ids.shape[1] // 2
    logits = model(**inputs, use_cache=False).logits[:, half - 1 : -1].float()
    target = ids[:, half:].to(logits.device)
    return nn.functional.cross_entropy(logits.transpose(1, 2), target, reduction="none").mean(1)


def _summarize(rows: Mapping[str, Tensor], shape: torch.Size, swaps: int) -> Robustness:
    def rise(who: str, swapped: str) -> Tensor:
        return rows[f"{who} {swapped}"] - rows[f"{who} none"]

    own, other = rise("model", "model"), rise("reference", "reference")
    return Robustness(
        windows=shape[0],
        seqlen=shape[1],
        swaps=swaps,
        loss=rows["model none"].mean().item(),
        reference_loss=rows["reference none"].mean().item(),
        rise=own.mean().item(),
        rise_stderr=standard_error(own),
        reference_rise=other.mean().item(),
        reference_rise_stderr=standard_error(other),
        difference=(own - other).mean().item(),
        difference_stderr=standard_error(own - other),
        transferred=rise("model", "reference").mean().item(),
        transferred_back=rise("reference", "model").mean().item(),
    )


def lines(result: Robustness) -> Iterator[str]:
    """For people: both models, with both sets of swaps."""
    yield f"{result.swaps} tokens swapped in the first halves of {result.windows} windows of {result.seqlen} tokens"
    yield f"{'loss of the second halves (nats)':<34}{'model':>20}{'reference':>20}"
    yield f"{'unchanged':<34}{significant(result.loss):>20}{significant(result.reference_loss):>20}"
    own = with_error(result.rise, result.rise_stderr)
    other = with_error(result.reference_rise, result.reference_rise_stderr)
    yield f"{'risen by swaps found on it':<34}{own:>20}{other:>20}"
    transferred = significant(result.transferred), significant(result.transferred_back)
    yield f"{'risen by swaps found on the other':<34}{transferred[0]:>20}{transferred[1]:>20}"
    yield f"{'model above reference':<34}{with_error(result.difference, result.difference_stderr):>20}"
