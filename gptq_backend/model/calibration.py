"""Calibration data: texts or token ids -> batches of equal length."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, GPTQError
from .structure import input_embeddings

Batch = dict[str, Tensor]
# Enough rows to keep a matrix multiplication busy, few enough that no activation gets large.
_TOKENS_PER_BATCH = 2048


def tokenize(
    texts: str | Sequence[str],
    tokenizer: Callable[..., Any],
    seqlen: int | None = None,
    samples: int | None = None,
    seed: int = 0,
) -> list[Tensor]:
    """Token ids of calibration texts.

    Args:
        texts: one text or several.
        tokenizer: a transformers tokenizer, or any callable that returns ``{"input_ids": [ids]}``.
        seqlen: join the texts and split them into windows of this length (:func:`split_windows`); None keeps each text
            as one sample.
        samples: keep this many, drawn without replacement with ``seed``, in text order.

    Returns:
        int64 tensors [T].

    Raises:
        CalibrationError: no text, or fewer tokens than one window.
    """
    texts = [texts] if isinstance(texts, str) else list(texts)
    for index, text in enumerate(texts):
        if not isinstance(text, str):
            raise CalibrationError(
                f"calibration text {index} is a {type(text).__name__}; expected texts or token ids, not both"
            )
    if (seqlen is not None and seqlen < 1) or (samples is not None and samples < 1):
        raise CalibrationError(f"seqlen={seqlen} and samples={samples} must be positive")
    ids = [list(tokenizer(text)["input_ids"]) for text in texts if text.strip()]
    if not any(ids):
        raise CalibrationError(f"the calibration set is empty: {len(texts)} texts, no tokens; pass some text")
    if seqlen is not None:
        joined = list(itertools.chain.from_iterable(ids))
        ids = split_windows(joined, seqlen, tokenizer)
        if not ids:
            raise CalibrationError(
                f"the calibration text has {len(joined)} tokens, fewer than one window of seqlen={seqlen}; "
                "pass more text or a smaller seqlen"
            )
    return [torch.tensor(sample, dtype=torch.long) for sample in sample_windows(ids, samples, seed) if sample]


def split_windows(ids: Sequence[int], seqlen: int, tokenizer: Any) -> list[list[int]]:
    """Windows of ``seqlen`` tokens, one after another.

    Where the tokenizer began the text with its beginning-of-text token, it begins every window, as it will every
    prompt: attention heads rest on that token, and models like Gemma are not themselves without it.
    """
    begin = list(ids[:1]) if seqlen > 1 and ids and ids[0] == getattr(tokenizer, "bos_token_id", None) else []
    step = seqlen - len(begin)
    return [begin + list(ids[i : i + step]) for i in range(len(begin), len(ids) - step + 1, step)]


def sample_windows(samples: Sequence[Any], count: int | None, seed: int = 0) -> list[Any]:
    """``count`` of the samples without replacement, in their order; all if there are fewer, or ``count`` is None."""
    if count is not None and count < 1:
        raise CalibrationError(f"samples={count} must be positive, or None for all")
    if count is None or count >= len(samples):
        return list(samples)
    chosen = torch.randperm(len(samples), generator=torch.Generator().manual_seed(seed))[:count]
    return [samples[i] for i in chosen.sort().values.tolist()]


def held_out_windows(
    texts: str | Sequence[str], tokenizer: Callable[..., Any], seqlen: int, samples: int, seed: int, count: int
) -> list[Tensor]:
    """Up to ``count`` windows that :func:`tokenize` with the same arguments does not sample, evenly spread."""
    windows = tokenize(texts, tokenizer, seqlen)
    drawn = set(sample_windows(range(len(windows)), samples, seed))
    rest = [window for i, window in enumerate(windows) if i not in drawn]
    return [rest[i * len(rest) // count] for i in range(count)] if len(rest) > count else rest


def require_sequences(samples: Iterable[Any]) -> None:
    """Raises CalibrationError for a sample that is one number: of a flat sequence of ids, each would be a sample."""
    for index, sample in enumerate(samples):
        ids = sample.get("input_ids") if isinstance(sample, Mapping) else sample
        if isinstance(ids, Number) or getattr(ids, "ndim", None) == 0:
            raise CalibrationError(
                f"calibration sample {index} is one number and not a sequence of token ids; to calibrate on a single "
                "sequence, pass it in a list: [ids]"
            )


def make_batches(samples: Sequence[Any] | Tensor | Mapping[str, Any], batch_size: int | None = None) -> list[Batch]:
    """Group samples of equal length.

    Args:
        samples: token ids each: a tensor [T] or [B, T], a list of ints, or a mapping with ``input_ids`` and optionally
            ``attention_mask`` (0 marks padding, which calibration ignores; rows of nothing else are left out). One such
            mapping alone, as a tokenizer returns it, counts as one sample.
        batch_size: sequences per batch; None aims at about 2048 tokens.

    Raises:
        CalibrationError: nothing in it, an entry that is not token ids (or a single one) or whose mask has another
            shape, or ``batch_size`` below 1.
    """
    if isinstance(samples, Mapping):
        samples = [samples]
    if batch_size is not None and batch_size < 1:
        raise CalibrationError(f"batch_size={batch_size} must be positive, or None for about 2048 tokens")
    require_sequences(samples)
    rows: dict[tuple[int, bool], list[Batch]] = {}
    for index, sample in enumerate(samples):
        fields = sample if isinstance(sample, Mapping) else {"input_ids": sample}
        try:
            keys = ["input_ids"] + ["attention_mask"] * (fields.get("attention_mask") is not None)
            batch = {key: torch.atleast_2d(torch.as_tensor(fields[key])) for key in keys}
            ids = batch["input_ids"]
        except (KeyError, TypeError, ValueError, RuntimeError):
            raise CalibrationError(
                f"calibration sample {index} is a {type(sample).__name__}; expected token ids: a tensor [T] or [B, T], "
                "a list of ints, or a mapping with input_ids"
            ) from None
        if not ids.numel():
            continue  # before the dtype: an empty list becomes a float tensor
        if ids.is_floating_point() or ids.dim() != 2:
            raise CalibrationError(
                f"calibration sample {index} has dtype {ids.dtype} and shape {tuple(ids.shape)}; expected integer "
                "token ids [T] or [B, T]"
            )
        mask = batch.get("attention_mask")
        if mask is not None:
            if mask.shape != ids.shape:
                raise CalibrationError(
                    f"calibration sample {index} has an attention_mask of shape {tuple(mask.shape)}; expected that of "
                    f"its input_ids, {tuple(ids.shape)}"
                )
            mask = mask != 0
            real = mask.any(1)
            if not real.any():
                continue
            batch = {"input_ids": ids[real], "attention_mask": mask[real]}
        rows.setdefault((ids.shape[1], mask is not None), []).append(batch)
    if not rows:
        raise CalibrationError("the calibration set is empty; pass at least one sample of token ids")
    batches = []
    for (length, _), group in sorted(rows.items(), key=lambda item: item[0], reverse=True):
        joined = {key: torch.cat([batch[key] for batch in group]).long() for key in group[0]}
        size = batch_size or max(1, _TOKENS_PER_BATCH // length)
        for first in range(0, joined["input_ids"].shape[0], size):
            batches.append({key: value[first : first + size] for key, value in joined.items()})
    return batches


def model_inputs(model: nn.Module, batch: Batch, device: torch.device | None) -> dict[str, Any]:
    """Keyword arguments to call ``model`` with: the batch, and no cache of keys and values.

    On ``device``; None means where the model's weights are, or the CPU if they are nowhere yet.
    """
    parameter = next(model.parameters())
    device = device or (parameter.device if not parameter.is_meta else torch.device("cpu"))
    inputs: dict[str, Any] = {key: value.to(device) for key, value in batch.items()}
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        inputs["use_cache"] = False
    return inputs


def call_model(model: nn.Module, inputs: Mapping[str, Any], begun: Callable[[], bool]) -> None:
    """Call a ``model`` whose blocks have hooks with :func:`model_inputs`.

    Raises:
        CalibrationError: an error before a block was reached (``begun``): nothing of ours has run, so it means that the
            model wants other inputs, like images or sound.
    """
    try:
        model(**inputs)
    except (TypeError, ValueError, AttributeError) as error:
        if begun() or isinstance(error, GPTQError):
            raise
        raise CalibrationError(
            f"{type(model).__name__} cannot be called with token ids alone ({error}), so calibration is not possible; "
            "pass calibration=None, which rounds to nearest"
        ) from error


def check_fits(model: nn.Module, batches: list[Batch]) -> None:
    """Raises CalibrationError for token ids or lengths that the model's embeddings would fail on without a word."""
    vocabulary = getattr(input_embeddings(model), "num_embeddings", None)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for batch in batches:
        ids = batch["input_ids"]
        if vocabulary is not None and not 0 <= int(ids.min()) <= int(ids.max()) < vocabulary:
            raise CalibrationError(
                f"calibration token ids span {int(ids.min())}..{int(ids.max())}, but the model's vocabulary has "
                f"{vocabulary} entries; tokenize with the model's own tokenizer"
            )
        if longest is not None and 0 < longest < ids.shape[1]:  # XLNet says -1 for any length
            raise CalibrationError(
                f"a calibration sample has {ids.shape[1]} tokens, but the model takes at most {longest} "
                "(max_position_embeddings); pass a smaller seqlen"
            )
