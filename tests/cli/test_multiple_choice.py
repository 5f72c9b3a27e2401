"""Questions with given answers: the files, the tokens that count, and figures against plain formulas."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from torch import nn

from gptq_backend import GPTQError
from gptq_cli import multiple_choice as module
from gptq_cli.multiple_choice import Item, answer, check_lengths, encode, lines, log_likelihoods, read_items
from tests.cli.tiny_models import tiny_llama


def _model(seed: int) -> nn.Module:
    return tiny_llama(seed, spread=0.3, num_hidden_layers=1, max_position_embeddings=64)


def _tokenizer(text: str) -> dict[str, list[int]]:
    """A token a character."""
    return {"input_ids": [ord(char) % 64 for char in text]}


def _write(path: Path, content: Any) -> Path:
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_bigbench_prompts_are_those_of_its_own_evaluation(tmp_path: Path) -> None:
    task = {
        "task_prefix": "Choose.",
        "examples": [
            {"input": "One or two?", "target_scores": {"one": 0, "two": 1}},
            {"input": "Free text?", "target": "yes"},
            {"input": "All alike?", "target_scores": {"a": 1, "b": 1}},
            {"input": "Two are right?", "target_scores": {"a": 1, "b": 0, "c": 1}},
        ],
    }
    first, second = read_items(_write(tmp_path / "task.json", task), 10)
    assert first.prompt == "Choose.\nQ: One or two?\n  choice: one\n  choice: two\nA: "
    assert (first.choices, first.right) == (("one", "two"), {1})
    assert second.right == {0, 2}
    task |= {"append_choices_to_input": False, "example_input_prefix": "", "example_output_prefix": " = "}
    assert read_items(_write(tmp_path / "task.json", task), 10)[0].prompt == "Choose.One or two? = "
    task |= {"append_choices_to_input": True, "choice_prefix": "\n- "}
    assert read_items(_write(tmp_path / "task.json", task), 10)[0].prompt == "Choose.One or two?\n- one\n- two = "


def test_items_of_a_long_file_are_taken_evenly_spread(tmp_path: Path) -> None:
    row = {"choices": ["a", "b\u2028c"], "answer": 1}
    text = "\n".join(json.dumps({"question": str(i), **row}, ensure_ascii=False) for i in range(10))
    file = _write(tmp_path / "tasks.jsonl", text)
    assert [item.prompt for item in read_items(file, 4)] == ["0", "2", "5", "7"]
    assert [item.prompt for item in read_items(file, 20)] == [str(i) for i in range(10)]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("task.json", "{"),
        ("task.json", "[" * 100_000),
        ("task.json", []),
        ("task.json", {"examples": 3}),
        ("task.json", {"examples": []}),
        ("task.json", {"examples": [{"input": "q", "target_scores": {"a": 1}}]}),
        ("task.json", {"examples": [{"input": "q", "target_scores": {"a": "1", "b": "2"}}]}),
        ("task.json", {"examples": [], "task_prefix": 3}),
        ("task.json", {"examples": [{"input": "q", "target_scores": {"a": math.nan, "b": 1}}]}),
        ("task.json", {"examples": [{"input": "q\ud800", "target_scores": {"a": 0, "b": 1}}]}),
        ("a.jsonl", {"question": "q", "choices": ["a", "b\udfff"], "answer": 0}),
        ("a.jsonl", ""),
        ("a.jsonl", "3"),
        ("a.jsonl", {"question": "q", "choices": ["a", "b"], "answer": 2}),
        ("a.jsonl", {"question": "q", "choices": ["a", "b"], "answer": True}),
        ("a.jsonl", {"question": "q", "choices": ["a", " "], "answer": 0}),
        ("a.jsonl", {"question": "q", "choices": ["a"], "answer": 0}),
        ("a.jsonl", {"question": " ", "choices": ["a", "b"], "answer": 0}),
        ("a.jsonl", {"question": 1, "choices": ["a", "b"], "answer": 0}),
    ],
)
def test_a_file_without_questions_is_refused_with_what_is_expected(tmp_path: Path, name: str, content: Any) -> None:
    with pytest.raises(GPTQError, match="expected BIG-bench's task.json") as caught:
        read_items(_write(tmp_path / name, content), 10)
    assert len(str(caught.value)) < 500


def test_a_line_that_is_no_json_is_named(tmp_path: Path) -> None:
    good = json.dumps({"question": "q", "choices": ["a", "b"], "answer": 0})
    with pytest.raises(GPTQError, match="line 3 is '{\"question"):
        read_items(_write(tmp_path / "a.jsonl", f"{good}\n\n{good[:-1]}"), 10)


@pytest.mark.parametrize("prompt", ["Q: x?\nA: ", "Q: x?\nA:", "Is it? "])
@pytest.mark.parametrize("choices", [("yes", "no"), ("no", "no way"), ("no way", "no"), ("a", "a")])
def test_likelihoods_count_the_tokens_that_answers_differ_in(
    monkeypatch: pytest.MonkeyPatch, prompt: str, choices: tuple[str, ...]
) -> None:
    monkeypatch.setattr(module, "_TOKENS", 16)  # one row after the other
    model = _model(0)
    rows, first = encode(Item(prompt, choices, frozenset({0})), _tokenizer)
    assert all(row[:first] == rows[0][:first] for row in rows)
    assert all(1 <= first < len(row) for row in rows)
    found = log_likelihoods(model, rows, first)
    for row, value in zip(rows, found):
        with torch.no_grad():
            logits = model(torch.tensor([row])).logits[0].double().log_softmax(-1)
        plain = sum(logits[i - 1, row[i]].item() for i in range(first, len(row)))
        assert value.item() == pytest.approx(plain, rel=1e-4)


def test_a_prompt_that_ends_in_a_space_gives_the_same_tokens_as_one_that_does_not() -> None:
    with_space, without = (Item(prompt, ("yes", "no"), frozenset({0})) for prompt in ("A: ", "A:"))
    assert encode(with_space, _tokenizer) == encode(without, _tokenizer)
    spaced = Item("A:", (" yes", " no"), frozenset({0}))
    assert encode(spaced, _tokenizer) == encode(without, _tokenizer)


def test_tokens_that_join_prompt_and_answer_count_for_each_answer() -> None:
    """As of a vocabulary with "b" and "bc": the prompt's last token then depends on the answer."""

    def merging(text: str) -> dict[str, list[int]]:
        return {"input_ids": [60 if part == "bc" else ord(part) % 60 for part in re.findall("bc|.", text)]}

    rows, first = encode(Item("ab\n", ("cd", "cde"), frozenset({0})), merging)
    assert (rows[1][: len(rows[0])], first) == (rows[0], len(rows[0]) - 1)
    rows, first = encode(Item("a ", ("b", "bc"), frozenset({0})), merging)
    assert (first, [row[first:] for row in rows]) == (2, [[ord("b") % 60], [60]])


def test_figures_equal_the_plain_formulas() -> None:
    model, reference = _model(0), _model(1)
    items = [Item(f"question {i}", ("yes", "not", "why"), frozenset({i % 3})) for i in range(24)]
    result = answer("task", items, model, _tokenizer, reference)
    ours, theirs = ([module.choose(each, *encode(item, _tokenizer)) for item in items] for each in (model, reference))
    right = [(a in item.right, b in item.right) for a, b, item in zip(ours, theirs, items)]
    assert result.items == 24
    assert result.chance == pytest.approx(1 / 3)
    assert result.accuracy == pytest.approx(sum(a for a, _ in right) / 24)
    assert result.reference_accuracy == pytest.approx(sum(b for _, b in right) / 24)
    assert result.flips == pytest.approx(sum(a != b for a, b in zip(ours, theirs)) / 24)
    assert result.flips > 0
    assert result.lost == pytest.approx(sum(b and not a for a, b in right) / 24)
    assert result.gained == pytest.approx(sum(a and not b for a, b in right) / 24)
    share = result.accuracy
    assert result.accuracy_stderr == pytest.approx(math.sqrt(share * (1 - share) / 24))
    spread = result.lost + result.gained - (result.lost - result.gained) ** 2
    assert result.difference_stderr == pytest.approx(math.sqrt(spread / 24))


def test_a_model_flips_nothing_of_its_own_and_alone_has_no_flips() -> None:
    model = _model(0)
    items = [Item(f"question {i}", ("yes", "no"), frozenset({0})) for i in range(4)]
    same = answer("task", items, model, _tokenizer, model)
    assert (same.flips, same.lost, same.gained) == (0, 0, 0)
    alone = answer("task", items, model, _tokenizer)
    assert (alone.flips, alone.reference_accuracy) == (None, None)
    assert "flips" not in "".join(lines([alone]))
    assert "flips" in "".join(lines([same]))


def test_an_item_that_is_too_long_for_the_model_is_refused() -> None:
    with pytest.raises(GPTQError, match="exceed the model's 64 positions"):
        answer("task", [Item("x" * 70, ("a", "b"), frozenset({0}))], _model(0), _tokenizer)
    items = [Item("x" * length, ("a", "bcd"), frozenset({0})) for length in (60, 61)]
    check_lengths("task", items[:1], [_model(0)], _tokenizer)
    with pytest.raises(GPTQError, match=r"task: question 2 of 2 \('x+'...\) has 65 tokens .* reads at most 64"):
        check_lengths("task", items, [_model(0)], _tokenizer)
