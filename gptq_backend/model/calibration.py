"""Calibration data: texts or token ids -> batches of equal length."""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from numbers import Number
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError, GPTQError, is_out_of_memory
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
    """Group samples of equal shapes.

    Args:
        samples: token ids each: a tensor [T] or [B, T], a list of ints, or a mapping of all that the model is to be
            called with: ``input_ids``, ``attention_mask`` (0 marks padding, which calibration ignores; rows of nothing
            else are left out), what a decoder reads, images, sound. One such mapping alone, as a tokenizer or a
            processor returns it, counts as one sample. Samples are joined if all their tensors have a row per sequence.
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
    groups: dict[tuple[Any, ...], list[Batch]] = {}
    for index, sample in enumerate(samples):
        if (batch := _one_sample(index, sample)) is not None:
            form = str([(key, tuple(value.shape[1:])) for key, value in batch.items()])
            length = batch["input_ids"].shape[1] if "input_ids" in batch else _TOKENS_PER_BATCH
            apart = -1 if count_sequences(batch) else index
            groups.setdefault((length, len(batch), form, apart), []).append(batch)
    if not groups:
        raise CalibrationError("the calibration set is empty; pass at least one sample of token ids")
    batches: list[Batch] = []
    for (length, *_), group in sorted(groups.items(), key=lambda item: item[0], reverse=True):
        joined = group[0] if len(group) == 1 else {key: torch.cat([each[key] for each in group]) for key in group[0]}
        rows = count_sequences(joined)
        size = batch_size or max(1, _TOKENS_PER_BATCH // length)
        for first in range(0, rows, size):
            batches.append({key: value[first : first + size] for key, value in joined.items()})
        if not rows:
            batches.append(joined)
    return batches


def count_sequences(batch: Batch) -> int:
    """How many sequences there are; 0 if not all tensors have a row for each, like those of images cut into patches."""
    rows = {len(value) if value.dim() else 0 for value in batch.values()}
    return rows.pop() if len(rows) == 1 else 0


def _one_sample(index: int, sample: Any) -> Batch | None:
    """A calibration sample as tensors with a batch dimension; None if it holds no token."""
    fields = sample if isinstance(sample, Mapping) else {"input_ids": sample}
    try:
        batch = {key: torch.as_tensor(value) for key, value in fields.items() if value is not None}
    except (TypeError, ValueError, RuntimeError):
        batch = {}
    if not batch:
        raise CalibrationError(
            f"calibration sample {index} is a {type(sample).__name__}; expected token ids: a tensor [T] or [B, T], a "
            "list of ints, or a mapping of input_ids and other tensors that the model takes"
        )
    if (ids := batch.get("input_ids")) is None:
        return _with_decoder_mask(batch)
    if not ids.numel():
        return None  # before the dtype: an empty list becomes a float tensor
    if ids.dim() < 2:
        batch = {key: torch.atleast_2d(value) if value.dim() < 2 else value for key, value in batch.items()}
        ids = batch["input_ids"]
    if ids.is_floating_point() or ids.dim() != 2:
        raise CalibrationError(
            f"calibration sample {index} has dtype {ids.dtype} and shape {tuple(ids.shape)}; expected integer token "
            "ids [T] or [B, T]"
        )
    batch["input_ids"] = ids.long()
    if "attention_mask" in batch:
        mask = torch.atleast_2d(batch["attention_mask"])
        if mask.shape != ids.shape:
            raise CalibrationError(
                f"calibration sample {index} has an attention_mask of shape {tuple(mask.shape)}; expected that of its "
                f"input_ids, {tuple(ids.shape)}"
            )
        batch["attention_mask"] = (mask != 0).long()
        real = (mask != 0).any(1)
        if not real.any():
            return None
        if count_sequences(batch) and not real.all():
            batch = {key: value[real] for key, value in batch.items()}
    return _with_decoder_mask(batch)


def _with_decoder_mask(batch: Batch) -> Batch:
    """A layer's padding is told by the shape of its input: masks of both stacks that differ have different lengths."""
    mask, ids = batch.get("attention_mask"), batch.get("decoder_input_ids")
    if mask is None or ids is None:
        return batch
    given = batch.get("decoder_attention_mask", torch.ones_like(ids))
    if given.shape == mask.shape and not torch.equal(given != 0, mask != 0):
        ids, given = (nn.functional.pad(each, (0, 1)) for each in (ids, given))
    return {**batch, "decoder_input_ids": ids, "decoder_attention_mask": given}


def masks_of(inputs: Mapping[str, Tensor]) -> list[Tensor]:
    """Which tokens of a batch are padding (0), [B, T] for each stack of the model."""
    return [inputs[key] for key in ("attention_mask", "decoder_attention_mask") if key in inputs]


def output_mask(model: nn.Module, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """The mask of the tokens that the model predicts."""
    decodes = "decoder_input_ids" in inputs or getattr(getattr(model, "config", None), "is_encoder_decoder", False)
    return inputs.get("decoder_attention_mask" if decodes else "attention_mask")


def model_inputs(model: nn.Module, batch: Batch, device: torch.device | None) -> dict[str, Any]:
    """Keyword arguments to call ``model`` with: the batch, and no cache of keys and values.

    On ``device``; None means where the model's weights are, or the CPU if they are nowhere yet. Images and sound get
    the dtype that the weights are computed in.
    """
    parameter = next(model.parameters())
    device = device or (parameter.device if not parameter.is_meta else torch.device("cpu"))
    dtype = parameter.dtype if device.type != "cpu" else torch.promote_types(parameter.dtype, torch.float32)
    inputs: dict[str, Any] = {
        key: value.to(device, dtype if value.is_floating_point() else None) for key, value in batch.items()
    }
    accepted = inspect.signature(model.forward).parameters
    if "use_cache" in accepted or any(p.kind is p.VAR_KEYWORD for p in accepted.values()):
        inputs["use_cache"] = False
    return inputs


def call_model(model: nn.Module, inputs: Mapping[str, Any], begun: Callable[[], bool]) -> None:
    """Call a ``model`` whose blocks have hooks with :func:`model_inputs`.

    Raises:
        CalibrationError: an error before all blocks were reached, and in none (``begun``): nothing of ours was running,
            so it means that the model wants other inputs, like images, sound, or what its decoder is to read.
    """
    names = set(inputs) - {"use_cache"}
    given = "token ids" if names <= {"input_ids", "attention_mask"} else ", ".join(sorted(names))
    try:
        model(**inputs)
    except (TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
        if begun() or isinstance(error, GPTQError) or is_out_of_memory(error):
            raise
        raise CalibrationError(
            f"{type(model).__name__} cannot be called with {given} alone ({error}); pass calibration samples "
            "with all that it needs, as its processor makes them, or calibration=None, which rounds to nearest"
        ) from error


def check_fits(model: nn.Module, batches: list[Batch]) -> None:
    """Raises CalibrationError for inputs that the model does not take, and for token ids or lengths that its embeddings
    would fail on without a word.
    """
    vocabulary = getattr(input_embeddings(model), "num_embeddings", None)
    longest = getattr(getattr(model, "config", None), "max_position_embeddings", None)
    for key in sorted({key for batch in batches for key in batch} - _accepted(model)):
        raise CalibrationError(
            f"the calibration data have {key!r}, which {type(model).__name__} does not take; leave it out, or pass "
            f"what its processor returns (it takes {', '.join(inspect.signature(model.forward).parameters)})"
        )
    for batch in batches:
        if (ids := batch.get("input_ids")) is None:
            continue
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


def _accepted(model: nn.Module) -> set[str]:
    """Names that the model's ``forward`` has; of one that hands on the rest, also those of its parts.

    The two that calibration itself needs are never refused.
    """
    forwards = [model.forward]
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(model.forward).parameters.values()):
        forwards += {type(module): type(module).forward for module in model.modules()}.values()
    return {"input_ids", "attention_mask"}.union(*(inspect.signature(forward).parameters for forward in forwards))
