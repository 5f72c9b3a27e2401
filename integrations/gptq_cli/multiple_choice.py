"""Questions with given answers: how many does a model answer rightly, and which of its answers does quantizing flip?

Flips tell more than accuracy: answers that became wrong and others that became right cancel out in it (arXiv
2407.09141).
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn

from gptq_backend import GPTQError

from .evaluate import check_limits
from .formatting import percent
from .models import model_limits
from .terminal import json_lines, read_text

_BEGIN = "\nQ: "  # what BIG-bench puts before a question where a task says nothing
_ANSWER = "\nA: "  # and before the answer
_CHOICE = "\n  choice: "
_TOKENS = 2048  # of the answers to one item that go through a model at once: their logits are large


@dataclass(frozen=True)
class Item:
    """A question, its answers, and the numbers of those that are right."""

    prompt: str
    choices: tuple[str, ...]
    right: frozenset[int]


@dataclass(frozen=True)
class TaskResult:
    """What :func:`answer` found in one file; the second half is None without a reference."""

    name: str
    items: int
    chance: float  # share that blind guessing gets right
    accuracy: float
    accuracy_stderr: float  # over items
    reference_accuracy: float | None = None
    flips: float | None = None  # share of items that both models answer differently
    lost: float | None = None  # share that only the reference answers rightly
    gained: float | None = None  # share that only the model answers rightly
    difference_stderr: float | None = None  # of the difference of both accuracies, paired by item


def read_items(path: Path, most: int) -> list[Item]:
    """Items of a BIG-bench ``task.json``, or of a ``.jsonl`` file of ``{"question": ..., "choices": [...],
    "answer": 0}``.

    Args:
        most: of a file that has more, so many are taken, evenly spread.

    Raises:
        GPTQError: the file cannot be read or is something else, or an item makes no sense.
    """
    text = read_text(path)
    try:
        found = _read_lines(text) if path.suffix == ".jsonl" else _read_bigbench(json.loads(text))
    except (ValueError, RecursionError) as error:  # the second of brackets in brackets
        raise GPTQError(f"{path}: no questions could be read: {error}; {_EXPECTED}") from None
    if not found:
        raise GPTQError(f"{path} has no question with at least two answers, one of them right; {_EXPECTED}")
    step = max(1.0, len(found) / most)
    return [found[int(i * step)] for i in range(min(most, len(found)))]


_EXPECTED = (
    "expected BIG-bench's task.json of multiple choice, or a .jsonl file that has in each line an object with question "
    "(text), choices (list of texts) and answer (the number of the right one, from 0)"
)


def _read_lines(text: str) -> list[Item]:
    found = []
    for number, line, entry in json_lines(text):
        item = _read_line(entry) if isinstance(entry, dict) else None
        if item is None:
            raise ValueError(f"line {number} is {line[:80]!r}")
        found.append(item)
    return found


def _read_line(entry: Mapping[str, Any]) -> Item | None:
    question, choices, answer = entry.get("question"), entry.get("choices"), entry.get("answer")
    if not _is_text(question) or not isinstance(choices, list) or type(answer) is not int:
        return None
    if len(choices) < 2 or not 0 <= answer < len(choices) or not all(map(_is_text, choices)):
        return None
    return Item(question, tuple(choices), frozenset({answer}))


def _read_bigbench(task: Any) -> list[Item]:
    """As its own evaluation without examples builds the prompts."""
    examples = task.get("examples") if isinstance(task, dict) else None
    if not isinstance(examples, list):
        raise ValueError("it has no list of examples")
    begin, end = task.get("example_input_prefix", _BEGIN), task.get("example_output_prefix", _ANSWER)
    prefix, listed = task.get("task_prefix", ""), task.get("append_choices_to_input", True)
    before = task.get("choice_prefix", _CHOICE)
    if not all(isinstance(each, str) for each in (begin, end, prefix, before)):
        raise ValueError("its prefixes are no texts")
    found = []
    for entry in examples:
        scores = entry.get("target_scores") if isinstance(entry, dict) else None
        if not isinstance(scores, dict) or not _is_text(entry.get("input")):
            continue  # to be answered in free text
        choices = tuple(scores)
        numeric = all(map(_is_number, scores.values())) and all(map(_is_text, choices))
        if not numeric or len(choices) < 2 or len(set(scores.values())) == 1:
            continue
        right = frozenset(i for i, choice in enumerate(choices) if scores[choice] == max(scores.values()))
        shown = "".join(f"{before}{choice}" for choice in choices) if listed else ""
        found.append(Item(f"{prefix}{begin}{entry['input']}{shown}{end}", choices, right))
    return found


def _is_text(value: Any) -> TypeGuard[str]:
    """Not of halves of surrogate pairs, which JSON can hold and no tokenizer takes."""
    return isinstance(value, str) and bool(value.strip()) and not any("\ud800" <= char <= "\udfff" for char in value)


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, int | float) and abs(value) < math.inf  # Python reads NaN and Infinity, too


def answer(
    name: str,
    items: Sequence[Item],
    model: nn.Module,
    tokenizer: Callable[..., Any],
    reference: nn.Module | None = None,
    on_item: Callable[[int, int], None] | None = None,
) -> TaskResult:
    """Let ``model``, and ``reference`` beside it, choose among the answers of each item.

    Raises:
        GPTQError: an item is longer than what a model reads (see :func:`check_lengths`), or has other tokens than it.
    """
    found: list[tuple[int, int | None]] = []
    for done, item in enumerate(items, 1):
        ids, first = encode(item, tokenizer)
        theirs = None if reference is None else choose(reference, ids, first)
        found.append((choose(model, ids, first), theirs))
        if on_item is not None:
            on_item(done, len(items))
    return _summarize(name, items, found)


def check_lengths(name: str, items: Sequence[Item], models: Sequence[nn.Module], tokenizer: Callable[..., Any]) -> None:
    """Raises GPTQError for an item that is longer than what one of ``models`` reads."""
    most = min(model_limits(model)[0] for model in models)
    for number, item in enumerate(items, 1):
        if (longest := max(map(len, encode(item, tokenizer)[0]))) > most:
            raise GPTQError(
                f"{name}: question {number} of {len(items)} ({item.prompt.strip()[:40]!r}...) has {longest} tokens "
                f"with its longest answer, and a model reads at most {most:.0f}; take it out of the file"
            )


def encode(item: Item, tokenizer: Callable[..., Any]) -> tuple[list[list[int]], int]:
    """Token ids of the prompt with each answer behind it, and where the first token is that depends on the answer.

    One that ends in a word gets a space, unless the answers bring their own.
    """
    apart = item.prompt[-1:].isspace() or all(choice[0].isspace() for choice in item.choices)
    prompt = item.prompt if apart else f"{item.prompt} "
    rows = [list(tokenizer(f"{prompt}{choice}")["input_ids"]) for choice in item.choices]
    same = sum(1 for _ in itertools.takewhile(lambda column: len(set(column)) == 1, zip(*rows)))
    # A token that no answer differs in says nothing, but the model predicts from the token before.
    return rows, max(1, min(same, min(map(len, rows)) - 1))


def choose(model: nn.Module, rows: Sequence[Sequence[int]], first: int) -> int:
    """The number of the row whose tokens from ``first`` on are likeliest, given those before."""
    return int(log_likelihoods(model, rows, first).argmax())


def log_likelihoods(model: nn.Module, rows: Sequence[Sequence[int]], first: int) -> Tensor:
    """Of each row's tokens from ``first`` on, given those before: float32 [len(rows)]."""
    longest = max(map(len, rows))
    at_once = max(1, _TOKENS // longest)
    if len(rows) > at_once:
        parts = [rows[i : i + at_once] for i in range(0, len(rows), at_once)]
        return torch.cat([log_likelihoods(model, part, first) for part in parts])
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = torch.tensor(row)
        mask[i, : len(row)] = 1
    check_limits(model, ids)
    device = next(model.parameters()).device
    with torch.inference_mode():
        logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
        found = logits[:, first - 1 : -1].float().log_softmax(-1).cpu()
    if found.isnan().any():
        raise GPTQError("the logits are NaN; the dtype may overflow (try float32), or the checkpoint is damaged")
    taken = found.gather(-1, ids[:, first:, None]).squeeze(-1)
    return taken.mul_(mask[:, first:]).sum(-1)


def _summarize(name: str, items: Sequence[Item], found: Sequence[tuple[int, int | None]]) -> TaskResult:
    ours = torch.tensor([mine in item.right for item, (mine, _) in zip(items, found)]).double()
    chance = sum(len(item.right) / len(item.choices) for item in items) / len(items)
    result: dict[str, Any] = {"accuracy": ours.mean().item(), "accuracy_stderr": _stderr(ours)}
    if all(other is not None for _, other in found):
        theirs = torch.tensor([other in item.right for item, (_, other) in zip(items, found)]).double()
        result |= {
            "reference_accuracy": theirs.mean().item(),
            "flips": sum(mine != other for mine, other in found) / len(found),
            "lost": (theirs - ours).clamp(min=0).mean().item(),
            "gained": (ours - theirs).clamp(min=0).mean().item(),
            "difference_stderr": _stderr(ours - theirs),
        }
    return TaskResult(name, len(items), chance, **result)


def _stderr(values: Tensor) -> float:
    return (values.std(correction=0) / len(values) ** 0.5).item()


def lines(results: Sequence[TaskResult]) -> Iterator[str]:
    """For people: a row per task."""
    compared = results[0].reference_accuracy is not None
    names = [*("items", "chance", "accuracy"), *("reference", "flips", "lost", "gained") * compared]
    width = max(len(name) for name in ("task", *(result.name for result in results)))
    yield f"{'task':<{width}}" + "".join(f"{name:>12}" for name in names)
    for result in results:
        figures: Mapping[str, float | None] = vars(result)
        keys = ["reference_accuracy" if name == "reference" else name for name in names[1:]]
        yield f"{result.name:<{width}}{result.items:>12}" + "".join(f"{percent(figures[key]):>12}" for key in keys)
