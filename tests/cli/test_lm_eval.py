"""lm_eval, the evaluation harness that most papers use, runs our checkpoints and agrees with ``eval --tasks``."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("transformers")
pytest.importorskip("lm_eval", reason="lm_eval is not installed; make test-all brings it")

import lm_eval
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_cli.models import load_model
from gptq_cli.multiple_choice import Item, answer, encode, log_likelihoods

pytestmark = pytest.mark.slow

TASK = """
task: afterwards
dataset_path: json
dataset_kwargs:
  data_files: {file}
test_split: train
output_type: multiple_choice
doc_to_text: question
doc_to_choice: choices
doc_to_target: answer
metric_list:
  - metric: acc
"""


def test_lm_eval_finds_what_eval_finds(quantized: Path, tmp_path: Path) -> None:
    rows = [{"question": f"What comes after {i}?", "choices": ["this", "that one"], "answer": i % 2} for i in range(8)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    (tmp_path / "afterwards.yaml").write_text(TASK.format(file=tmp_path / "rows.jsonl"))
    tokenizer = AutoTokenizer.from_pretrained(quantized)
    tokenizer.eos_token = tokenizer.convert_ids_to_tokens(0)  # lm_eval wants one, and does not use it here
    loaded = AutoModelForCausalLM.from_pretrained(quantized, dtype="float32")
    found = lm_eval.simple_evaluate(
        HFLM(pretrained=loaded, tokenizer=tokenizer, batch_size=2),
        tasks=["afterwards"],
        task_manager=TaskManager(include_path=str(tmp_path)),
        bootstrap_iters=0,
        log_samples=True,
    )
    items = [Item(row["question"], tuple(row["choices"]), frozenset({row["answer"]})) for row in rows]
    model = load_model(quantized)
    assert found["results"]["afterwards"]["acc,none"] == answer("rows", items, model, tokenizer).accuracy
    for item, sample in zip(items, sorted(found["samples"]["afterwards"], key=lambda sample: sample["doc_id"])):
        theirs = [float(value[0][0] if isinstance(value[0], list | tuple) else value[0]) for value in sample["resps"]]
        ours = log_likelihoods(model, *encode(item, tokenizer)).tolist()
        # Theirs also counts tokens that all answers have in common.
        assert theirs[0] - theirs[1] == pytest.approx(ours[0] - ours[1], abs=1e-3)
