"""``calibration="auto"``: pool the user's text, packaged text and the model's own, and choose from it.

Nothing is fetched. The choice itself is :func:`gptq_backend.model.calibration_choice.select`.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import GenerationConfig, PreTrainedModel

from gptq_backend import CalibrationError, RunOptions
from gptq_backend.locks import scratch_folder
from gptq_backend.model import (
    Selection,
    check_fits,
    evaluating,
    make_batches,
    sample_windows,
    select,
    sketch,
    split_windows,
    tokenize,
)

from .errors import first_line
from .memory import bytes_of, free_bytes
from .streaming import load_streamed, load_whole, skeleton
from .whole_samples import whole_samples

logger = logging.getLogger(__name__)

AUTO = "auto"
USER, MODEL = "your text", "the model"  # names of sources, beside those of the packaged files
_POOL = 3  # windows in the pool for each that may be chosen
_LEAST = 8  # windows of each source in the pool, however few may be chosen
_HELD_OUT = 4  # one window of so many validates the choice and is not chosen
_GENERATED = 8  # windows of the model's own text, each token of which takes a step of the model
_RUN = 128  # tokens generated in one go; several runs make a window
_AT_ONCE = 32  # runs; every token of each is in memory, with its keys and values
_USER_SHARE = 0.5  # of the weight: the user knows best what the model will read


@dataclass(frozen=True)
class Choice:
    """What ``calibration="auto"`` uses, and why."""

    samples: Tensor  # int64 [n, T], to calibrate on
    held_out: Tensor  # int64 [m, T], the windows that validated the choice, a round of all sources at a time
    sources: dict[str, dict[str, float]]  # of each its windows in the "pool", those "chosen", and its "weight"
    left_out: dict[str, str]  # sources that gave nothing, and why
    selection: Selection

    def report(self) -> dict[str, Any]:
        """As JSON values."""
        return {
            "summary": self.summary(),
            "sources": self.sources,
            "left_out": self.left_out,
            "reason": self.selection.reason,
            "curve": [asdict(point) for point in self.selection.curve],
        }

    def summary(self) -> str:
        """One sentence: how many windows of what, and why no more."""
        counts = ", ".join(f"{name} {found['chosen']}" for name, found in self.sources.items())
        return f"{len(self.samples)} windows ({counts}): {self.selection.why}"


def choose(
    model_or_path: PreTrainedModel | str | Path,
    tokenizer: Any,
    text: str | Iterable[str] | None = None,
    options: RunOptions | None = None,
    *,
    samples: int | None = None,
    seqlen: int | None = None,
    seed: int = 0,
    trust_remote_code: bool = False,
) -> Choice:
    """Choose windows of text to calibrate on.

    The pool has about three times ``samples`` windows, as many from each source: each of the files in
    ``calibration_text``, and what the model itself generates (if it fits into half of the free memory as a whole).
    ``text`` gives as many, and weighs as much, as all others together.

    Args:
        model_or_path: a loaded model, or a folder or name.
        tokenizer: of the model.
        text: what the model will read, if there is some.
        options: where to compute (by default where the weights are), and the list of blocks.
        samples: choose at most this many windows; by default 64.
        seqlen: tokens per window; by default 512.
        seed: of the sampling, the model's text and the sketch; the same seed gives the same choice.
        trust_remote_code: let code that comes with the model run.

    Raises:
        CalibrationError: ``text`` is shorter than two windows, or all sources are. ConfigError: quantized already.
    """
    options = options or RunOptions()
    samples, seqlen = 64 if samples is None else samples, 512 if seqlen is None else seqlen
    if samples < 1 or seqlen < 1:
        raise CalibrationError(f"seqlen={seqlen} and samples={samples} must be positive")
    share = 0.0 if text is None else _USER_SHARE
    size = max(_LEAST, math.ceil(_POOL * samples * (1 - share) / (len(packaged_texts()) + 1)))
    pool, left_out = _packaged_pool(tokenizer, seqlen, size, seed)
    if text is not None:
        own = text if isinstance(text, str) else list(text)
        windows = _windows(own, tokenizer, seqlen, max(_LEAST, math.ceil(_POOL * samples * share)), seed)
        if len(windows) < 2:
            raise CalibrationError(
                f"calibration='auto' needs at least two windows of seqlen={seqlen} tokens from your text, but it has "
                f"{len(windows)}; pass more text, a smaller seqlen, or no text"
            )
        pool = {USER: windows, **pool}
    with _opened(model_or_path, options, trust_remote_code) as original:
        if pool:  # before it generates text
            check_fits(original.model, make_batches(list(pool.values())))
        try:
            if original.cannot_generate is not None:
                raise CalibrationError(original.cannot_generate)
            pool[MODEL] = _generated(original.model, tokenizer, min(size, _GENERATED), seqlen, seed)
        except CalibrationError as error:
            left_out[MODEL] = str(error)
        for name, reason in left_out.items():
            logger.warning("calibration='auto' goes without text of %s: %s", name, reason)
        if not pool:
            raise CalibrationError(
                f"the calibration pool is empty: no source has two windows of seqlen={seqlen} tokens; pass text of "
                "your own or a smaller seqlen"
            )
        ids, block_name = torch.cat(list(pool.values())), options.block_name
        source = getattr(model_or_path, "name_or_path", model_or_path)
        whole = whole_samples(list(ids), original.model, source, tokenizer, trust_remote_code, added=False)
        moments = sketch(
            original.model, whole, seed=seed, block_name=block_name, device=options.device, **original.hooks
        )
        channels = getattr(original.model.config.get_text_config(), "hidden_size", None)
    choice = _selected(pool, left_out, moments, channels, samples)
    logger.info("calibration='auto' uses %s", choice.summary())
    return choice


def _packaged_pool(tokenizer: Any, seqlen: int, count: int, seed: int) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Up to ``count`` windows of each packaged text, and the texts that are too short, with that reason."""
    found = {name: _windows(text, tokenizer, seqlen, count, seed) for name, text in packaged_texts().items()}
    short = f"shorter than two windows of {seqlen} tokens"
    left_out = {name: short for name, windows in found.items() if len(windows) < 2}
    return {name: windows for name, windows in found.items() if name not in left_out}, left_out


def _selected(
    pool: dict[str, Tensor], left_out: dict[str, str], moments: Tensor, channels: int | None, samples: int
) -> Choice:
    """Choose from the pool by its sketches, in which the user's text weighs as much as all others together."""
    ids = torch.cat(list(pool.values()))
    names = [name for name, windows in pool.items() for _ in windows]
    others = [name for name in pool if name != USER]
    weights = {name: (1 - _USER_SHARE * (USER in pool)) / len(others) for name in others}
    if USER in pool:
        weights[USER] = _USER_SHARE if others else 1.0
    held_out, seqlen = _held_out(pool), ids.shape[1]
    least = max(len(pool), math.ceil((channels or 0) / seqlen))  # no source forgotten, no fewer tokens than channels
    selection = select(
        moments, names, weights, samples, held_out=held_out, channels=channels, tokens=seqlen, least=least
    )
    chosen = Counter(names[i] for i in selection.chosen)
    sources = {
        name: {"pool": len(windows), "chosen": chosen[name], "weight": weights[name]} for name, windows in pool.items()
    }
    return Choice(ids[sorted(selection.chosen)], ids[held_out], sources, left_out, selection)


def packaged_texts() -> dict[str, str]:
    """The texts that come with this package, by name; their origins and licences are in the README beside them."""
    folder = resources.files(__package__) / "calibration_text"
    files = sorted((file for file in folder.iterdir() if file.name.endswith(".txt")), key=lambda file: file.name)
    return {file.name.removesuffix(".txt"): file.read_text(encoding="utf-8") for file in files}


def _windows(text: str | Sequence[str], tokenizer: Any, seqlen: int, count: int, seed: int) -> Tensor:
    """Up to ``count`` windows of the text, drawn with ``seed``: int64 [n, seqlen]; n may be 0."""
    joined = torch.cat(tokenize(text, tokenizer))
    found = split_windows(joined.tolist(), seqlen, tokenizer)
    windows = torch.tensor(found, dtype=torch.long).view(len(found), seqlen)
    return windows[sample_windows(range(len(windows)), count, seed)]


def _held_out(pool: dict[str, Tensor]) -> list[int]:
    """Indices of the windows held out of each source, one of each in turn."""
    rounds: list[tuple[int, int]] = []
    first = 0
    for windows in pool.values():
        count = max(1, len(windows) // _HELD_OUT)
        rounds += [(turn, first + (2 * turn + 1) * len(windows) // (2 * count)) for turn in range(count)]
        first += len(windows)
    return [index for _, index in sorted(rounds)]


@dataclass(frozen=True)
class _Original:
    """A model to sketch, and why it cannot generate text, if so."""

    model: PreTrainedModel
    cannot_generate: str | None = None
    hooks: Mapping[str, Callable[[nn.Module], object]] = field(default_factory=dict)  # of :func:`sketch`


@contextmanager
def _opened(
    model_or_path: PreTrainedModel | str | Path, options: RunOptions, trust_remote_code: bool
) -> Iterator[_Original]:
    """A loaded model as it is, a small one loaded as a whole, and of a large one a block at a time."""
    if isinstance(model_or_path, PreTrainedModel):
        offloaded = any(parameter.is_meta for parameter in model_or_path.parameters())
        yield _Original(model_or_path, "it is offloaded, and every token would read all of it" if offloaded else None)
        return
    model = skeleton(model_or_path, trust_remote_code)
    where = torch.device(options.device or "cpu")
    dtype = torch.float32 if where.type == "cpu" else model.dtype  # CPUs compute 16 bits slowly
    needed, free = bytes_of(model, dtype), free_bytes(where)
    if needed <= free / 2:
        yield _Original(load_whole(model_or_path, dtype, trust_remote_code).to(where))
        return
    reason = f"as a whole it takes {needed / 1e9:.1f} GB, more than half of the free {free / 1e9:.1f} GB"
    with scratch_folder("offload") as scratch:
        model, load = load_streamed(model_or_path, scratch, None, options.block_name, trust_remote_code)
        yield _Original(model, reason, {"on_block": load, "on_done": lambda block: block.to("meta")})


def _generated(model: PreTrainedModel, tokenizer: Any, count: int, seqlen: int, seed: int) -> Tensor:
    """``count`` windows of text that the model generates, int64 [count, seqlen].

    Runs start in turn from the beginning-of-text token, if there is one, and from a random token; all from the former
    where the tokenizer begins every text with it.

    Raises:
        CalibrationError: the model cannot generate, with the reason alone.
    """
    reads = getattr(model, "main_input_name", "input_ids") == "input_ids"
    if not model.can_generate():
        raise CalibrationError(f"{type(model).__name__} cannot generate")
    if getattr(model.config, "is_encoder_decoder", False) or not reads:
        raise CalibrationError(f"{type(model).__name__} does not continue text")
    if seqlen < 2:
        raise CalibrationError("windows of one token leave nothing to generate")
    length = min(seqlen, _RUN)
    runs = math.ceil(seqlen / length)
    embeddings: Any = model.get_input_embeddings()
    vocabulary = embeddings.num_embeddings
    if hasattr(tokenizer, "__len__"):
        vocabulary = min(vocabulary, len(tokenizer))  # embeddings may be padded
    words = sorted(set(range(vocabulary)) - set(getattr(tokenizer, "all_special_ids", ())))
    generator = torch.Generator().manual_seed(seed)
    starts = torch.tensor(words)[torch.randint(len(words), (count * runs, 1), generator=generator)]
    if (begin := getattr(tokenizer, "bos_token_id", None)) is not None:
        always = list(tokenizer("a")["input_ids"][:1]) == [begin]
        starts[:: 1 if always else 2] = begin
    settings = GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, max_new_tokens=length - 1, min_new_tokens=length - 1, pad_token_id=0,
        eos_token_id=getattr(model.generation_config, "eos_token_id", None),
    )  # fmt: skip
    starts = starts.to(embeddings.weight.device)
    before, model.generation_config = model.generation_config, settings  # of its own settings, generate() adds some
    try:
        with torch.random.fork_rng(), torch.no_grad(), evaluating(model):
            torch.manual_seed(seed)
            parts = [
                model.generate(each, attention_mask=torch.ones_like(each), generation_config=settings).cpu()
                for each in starts.split(_AT_ONCE)
            ]
            return torch.cat(parts).view(count, runs * length)[:, :seqlen]
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:  # of the model's own code
        raise CalibrationError(f"it cannot be sampled from ({first_line(error)})") from error
    finally:
        model.generation_config = before
