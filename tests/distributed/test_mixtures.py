"""Mixtures whose experts are shared out to ranks: each reads its own, and the checkpoint is that of one process."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")

from gptq_cli.run_progress import RunProgress
from tests.cli import command
from tests.distributed.commands import SETTINGS, run, torchrun
from tests.transformers.test_block_reader import saved

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
TORCHRUN = torchrun(2)


def begin(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> None:
    """A run of one process and one thread that ends behind its first block."""

    def end(*_: Any) -> None:
        raise KeyboardInterrupt

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(RunProgress, "block_done", end)
            assert command.run(*arguments).exit_code
    finally:
        torch.set_num_threads(threads)


@pytest.mark.timeout(600)
# Files with experts one by one, and fused with biases.
@pytest.mark.parametrize("family", ["qwen3_moe", pytest.param("gpt_oss", marks=pytest.mark.slow)])
def test_a_mixture_from_files_gets_the_bits_of_one_process_also_where_that_began(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    source = saved(tmp_path / "source", family)
    tokenizer = Path(__file__).parents[1] / "data/checkpoints/llama-4-32-sym/tokenizer.json"
    (source / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    found = {}
    for name, before in {"alone": (), "two": TORCHRUN}.items():
        done = run(*before, "gptq_cli", "quantize", source, tmp_path / name, *SETTINGS)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = load_file(tmp_path / name / "model.safetensors")
    shutil.rmtree(tmp_path / "two")
    begin(monkeypatch, "quantize", source, tmp_path / "two", *SETTINGS)
    done = run(*TORCHRUN, "gptq_cli", "quantize", source, tmp_path / "two", *SETTINGS)
    assert "going on with what an earlier run kept" in done.stderr
    again = load_file(tmp_path / "two" / "model.safetensors")
    assert all(torch.equal(tensor, again[name]) for name, tensor in found["alone"].items())
    assert found["two"].keys() == found["alone"].keys()
    assert all(torch.equal(tensor, found["two"][name]) for name, tensor in found["alone"].items())
