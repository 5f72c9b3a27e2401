"""The demo's parts that can silently stop showing what they claim to show."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

DOCS = Path(__file__).parents[2] / "docs" / "examples"
CHECKPOINT = Path(__file__).parents[1] / "data" / "checkpoints" / "llama-4-32-sym"


def test_the_loading_program_imports_nothing_of_ours() -> None:
    tree = ast.parse((DOCS / "demo_generate.py").read_text())
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {name for name in names if name.split(".")[0] not in sys.stdlib_module_names} == {"torch", "transformers"}


def test_the_loading_program_prints_one_line_of_json(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=259, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=2
    )
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(tmp_path)
    # Not AutoTokenizer: the folder names a class of transformers 5, which 4.x does not have.
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(CHECKPOINT / "tokenizer.json"), eos_token="</s>")
    tokenizer.chat_template = "{{ messages[0]['content'] }}"
    tokenizer.save_pretrained(tmp_path)
    command = [sys.executable, str(DOCS / "demo_generate.py"), str(tmp_path), "Hello", "3"]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=os.environ)
    result = json.loads(done.stdout)
    assert result["layer"] == "Linear"
    assert result["tokens_per_second"] > 0
