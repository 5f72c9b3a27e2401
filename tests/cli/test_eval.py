"""The command ``eval`` as a user types it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers")

from tests.cli.command import TEXT, error, run


def test_eval_refuses_a_reference_with_another_tokenizer(original: Path, quantized: Path, tmp_path: Path) -> None:
    other = shutil.copytree(original, tmp_path / "other")
    content = json.loads((other / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["e"], vocabulary["t"] = vocabulary["t"], vocabulary["e"]
    (other / "tokenizer.json").write_text(json.dumps(content))
    command = ["eval", quantized, "--reference", other, "--text", TEXT, "--seqlen", "32", "--windows", "2"]
    assert "a reference must have the same tokenizer" in error(run(*command))
    for file in other.glob("*token*"):
        file.unlink()
    result = run(*command)  # nothing to compare with
    assert result.exit_code == 0, result.output


def test_eval_prints_a_table_of_what_it_measured(original: Path, quantized: Path) -> None:
    result = run("eval", quantized, "--reference", original, "--text", TEXT, "--seqlen", "32", "--windows", "3")
    assert result.exit_code == 0, result.output
    for words in ("3 windows of 32 tokens", "perplexity of the reference", "mean KL divergence", "99th percentile"):
        assert words in result.stdout


def test_eval_answers_questions_and_swaps_tokens(original: Path, quantized: Path, tmp_path: Path) -> None:
    rows = [{"question": f"Which comes after {i}?", "choices": ["this", "that"], "answer": i % 2} for i in range(6)]
    questions = tmp_path / "questions.jsonl"
    questions.write_text("\n".join(map(json.dumps, rows)))
    options = ["--reference", original, "--tasks", questions, "--items", "4", "--json", tmp_path / "found.json"]
    result = run("eval", quantized, *options)
    assert result.exit_code == 0, result.output
    assert "flips" in result.stdout
    assert "perplexity" not in result.stdout
    (task,) = json.loads((tmp_path / "found.json").read_text())["tasks"]
    assert (task["name"], task["items"], task["chance"]) == ("questions", 4, 0.5)
    text = ["--text", TEXT, "--seqlen", "16", "--windows", "2"]
    result = run("eval", quantized, *options, *text, "--robustness", "2")
    assert result.exit_code == 0, result.output
    for words in ("perplexity", "flips", "2 tokens swapped in the first halves of 2 windows of 16 tokens"):
        assert words in result.stdout
    assert json.loads((tmp_path / "found.json").read_text())["robustness"]["swaps"] == 2


def test_eval_answers_each_of_two_files_of_the_same_name(quantized: Path, tmp_path: Path) -> None:
    options: list[object] = []
    for folder, count in (("a", 2), ("b", 3)):
        (tmp_path / folder).mkdir()
        row = json.dumps({"question": "Which?", "choices": ["this", "that"], "answer": 0})
        (tmp_path / folder / "questions.jsonl").write_text("\n".join([row] * count))
        options += ["--tasks", tmp_path / folder / "questions.jsonl"]
    result = run("eval", quantized, *options, "--json", "-")
    assert result.exit_code == 0, result.output
    assert [task["items"] for task in json.loads(result.stdout)["tasks"]] == [2, 3]


def test_eval_refuses_what_has_no_room_before_it_measures(original: Path, quantized: Path, tmp_path: Path) -> None:
    options = [quantized, "--reference", original, "--text", TEXT, "--seqlen", "16", "--windows", "2"]
    assert "room for 1 to 7 swaps" in error(run("eval", *options, "--robustness", "8"))
    questions = tmp_path / "questions.jsonl"
    row = {"question": "Why? " * 100, "choices": ["this", "that"], "answer": 0}
    questions.write_text(json.dumps(row))
    message = error(run("eval", *options, "--tasks", questions))
    assert "questions: question 1 of 1 ('Why? Why? " in message
    assert "reads at most 64" in message


def test_eval_says_what_robustness_needs(original: Path, quantized: Path) -> None:
    for options, words in ((["--text", TEXT], "--reference"), (["--reference", original], "--text")):
        result = run("eval", quantized, *options, "--robustness", "2")
        assert result.exit_code == 2
        assert words in result.stderr


def test_eval_compares_models_whose_texts_begin_with_a_token_of_their_own(
    original: Path, quantized: Path, tmp_path: Path
) -> None:
    models = [shutil.copytree(folder, tmp_path / folder.name) for folder in (original, quantized)]
    for model in models:
        file = model / "tokenizer.json"
        content = json.loads(file.read_text())
        begin = next(iter(content["model"]["vocab"]))
        number = content["model"]["vocab"][begin]
        content["post_processor"] = {
            "type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": begin, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
            "special_tokens": {begin: {"id": begin, "ids": [number], "tokens": [begin]}},
        }
        file.write_text(json.dumps(content))
        settings = model / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"bos_token": begin}))
    command = ["eval", models[1], "--reference", models[0], "--text", TEXT, "--seqlen", "32", "--windows", "3"]
    result = run(*command)
    assert result.exit_code == 0, result.output
    assert "3 windows of 32 tokens" in result.stdout
