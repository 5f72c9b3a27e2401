"""The work of ``gptq-backend eval``: what a text, questions and swapped tokens tell of a model."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from gptq_transformers.calibration_input import load_tokenizer

from . import evaluate, models, multiple_choice, robustness, terminal

_ATTACKED = 128  # tokens of a window in which some are swapped, at most: each swap takes 32 passes over it


@dataclass(frozen=True)
class Request:
    """The options of the command."""

    model: str
    reference: str | None
    text: Path | None
    seqlen: int
    windows: int
    tasks: Sequence[Path]
    items: int
    robustness: int | None
    dtype: str | None
    device: str
    backend: str | None
    head_bits: int | None
    trust_remote_code: bool


def run(asked: Request, json_target: str | None) -> None:
    """Read everything, load the models, measure, print.

    Raises:
        GPTQError: something cannot be read, or does not fit the models.
    """
    console, say = terminal.start(json_target)
    content = None if asked.text is None else terminal.read_text(asked.text)
    items = [(_task_name(path), multiple_choice.read_items(path, asked.items)) for path in asked.tasks]
    if asked.robustness is not None:
        robustness.check_room(min(_ATTACKED, asked.seqlen), asked.robustness)
    for path in filter(None, (asked.model, asked.reference)):
        models.require_model(path)
    models.require_device(asked.device)
    with console.status("loading", spinner="line"):
        tokenizer = load_tokenizer(asked.model, True, asked.trust_remote_code)
        windows = None if content is None else evaluate.cut_windows(content, tokenizer, asked.seqlen, asked.windows)
        if asked.reference is not None:
            texts = _texts(content, items)
            evaluate.check_reference_tokens(asked.reference, tokenizer, texts, asked.trust_remote_code)
        options: dict[str, Any] = {
            "dtype": asked.dtype,
            "device": asked.device,
            "trust_remote_code": asked.trust_remote_code,
        }
        model = models.load_model(asked.model, backend=asked.backend, head_bits=asked.head_bits, **options)
        reference = None if asked.reference is None else models.load_model(asked.reference, **options)
    for name, each in items:
        multiple_choice.check_lengths(name, each, [model] if reference is None else [model, reference], tokenizer)
    computed_in = str(next(p for p in model.parameters() if p.is_floating_point()).dtype).removeprefix("torch.")
    keys = ("model", "reference", "device", "head_bits")
    found: dict[str, Any] = {key: getattr(asked, key) for key in keys} | {"dtype": computed_in}
    if windows is not None:
        with _counted(console, "window") as count:
            result = evaluate.evaluate(model, windows, reference, count)
        found |= {"text": str(asked.text), **dataclasses.asdict(result)}
        say("\n".join(evaluate.lines(result, computed_in, asked.device)))
    if items:
        answered = []
        for name, each in items:
            with _counted(console, f"{name}: item") as count:
                answered.append(multiple_choice.answer(name, each, model, tokenizer, reference, count))
        found["tasks"] = [dataclasses.asdict(result) for result in answered]
        say("\n".join(multiple_choice.lines(answered)))
    if asked.robustness is not None and content is not None and reference is not None:
        short = evaluate.cut_windows(content, tokenizer, min(_ATTACKED, asked.seqlen), asked.windows)
        with _counted(console, "attacked window") as count:
            attacked = robustness.measure(model, reference, short, asked.robustness, tokenizer.all_special_ids, count)
        found["robustness"] = dataclasses.asdict(attacked)
        say("\n".join(robustness.lines(attacked)))
    terminal.write_json(json_target, found)


def _texts(content: str | None, items: Sequence[tuple[str, Sequence[multiple_choice.Item]]]) -> list[str]:
    """All that will be made tokens of."""
    questions = [f"{item.prompt}{choice}" for _, each in items for item in each for choice in item.choices]
    return [*([] if content is None else [content]), *questions]


@contextmanager
def _counted(console: Console, what: str) -> Iterator[Callable[[int, int], None]]:
    """A line on the terminal that says how many of ``what`` are done."""
    with console.status(what, spinner="line") as status:
        yield lambda done, total: status.update(f"{what} {done} of {total}")


def _task_name(path: Path) -> str:
    """BIG-bench has each task in a folder of that name."""
    return path.parent.name if path.name == "task.json" and path.parent.name else path.stem
