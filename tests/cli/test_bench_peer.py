"""llama.cpp takes its turn in a benchmark, or the user reads why it cannot."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from gptq_cli.bench_peer import LlamaCpp
from tests.cli.test_bench import CHECKPOINTS, bench


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--peer", "ollama=/bin/true"], "expected llama.cpp=PROGRAM"),
        (["--peer", "llama.cpp=/nowhere"], "/nowhere is no program"),
        (["--peer", "llama.cpp=/bin"], "llama-batched-bench is no program"),
        (["--peer", "llama.cpp=/bin/true"], "but none is given"),
        (["--peer", "llama.cpp=/bin/true", "--peer-model", "/nowhere.gguf"], "/nowhere.gguf is no file"),
        (["--peer", "llama.cpp=/bin/true", "--peer-model", __file__], "ended with 0 and 0 results"),
        (["--peer", "llama.cpp=/bin/cat", "--peer-model", __file__], "ended with 1 and 0 results; it said: .*cat"),
    ],
)
def test_a_peer_that_cannot_run_is_an_error(arguments: list[str], message: str) -> None:
    sizes = ["--prompt", "6", "--new-tokens", "4", "--repeats", "1"]
    result = bench("model", CHECKPOINTS / "llama-4-32-sym", *sizes, *arguments)
    assert result.exit_code == 1
    assert re.search(message, result.stderr.splitlines()[-1])


@pytest.mark.parametrize("option", ["./program", "program", ".", "llama-batched-bench"])
def test_a_peer_is_found_in_the_working_directory(option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("program", "llama-batched-bench"):
        (tmp_path / name).touch(0o755)
    monkeypatch.chdir(tmp_path)
    assert LlamaCpp(f"llama.cpp={option}", __file__).name == "llama.cpp test_bench_peer.py"


@pytest.mark.skipif("LLAMA_BATCHED_BENCH" not in os.environ, reason="LLAMA_BATCHED_BENCH=PROGRAM:MODEL.gguf is not set")
def test_llama_cpp_takes_its_turn() -> None:
    program, _, gguf = os.environ["LLAMA_BATCHED_BENCH"].partition(":")
    sizes = ["--prompt", "6", "--new-tokens", "4", "--batch", "2", "--repeats", "2"]
    peer = ["--peer", f"llama.cpp={program}", "--peer-model", gguf]
    result = bench("model", CHECKPOINTS / "llama-4-32-sym", *sizes, *peer, "--json", "-")
    assert result.exit_code == 0, result.output
    ours, theirs = (json.loads(result.stdout)["rows"][first::2] for first in (0, 1))
    assert [row["model"] for row in (ours[1], theirs[1])] == [f"llama.cpp {Path(gguf).name}"] * 2
    for own, other in (ours, theirs):
        assert own["ratio"] == pytest.approx(own["tokens_per_second"] / other["tokens_per_second"])
        assert other["ratio"] == 1
