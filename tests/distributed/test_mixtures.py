"""Mixtures whose experts are shared out to ranks: each reads its own, and the checkpoint is that of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers")

from tests.distributed.test_commands import TORCHRUN, run
from tests.distributed.test_deaths import TEXT
from tests.transformers.test_block_reader import saved

pytestmark = pytest.mark.skipif(not torch.distributed.is_gloo_available(), reason="this torch has no gloo")
QUANTIZE: tuple[Any, ...] = ("--samples", "6", "--seqlen", "16", "--batch-size", "1", "--group-size", "32")


@pytest.mark.timeout(600)
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])  # files with experts one by one, and fused with biases
def test_a_mixture_from_files_gets_the_bits_of_one_process(tmp_path: Path, family: str) -> None:
    source, text = saved(tmp_path / "source", family), ("--calibration", TEXT, "--kld-windows", "0")
    tokenizer = Path(__file__).parents[1] / "data/checkpoints/llama-4-32-sym/tokenizer.json"
    (source / "tokenizer.json").write_bytes(tokenizer.read_bytes())
    found = {}
    for name, command in {"alone": (), "two": TORCHRUN}.items():
        done = run(*command, "gptq_cli", "quantize", source, tmp_path / name, *text, *QUANTIZE)
        assert done.returncode == 0, done.stderr[-3000:]
        found[name] = load_file(tmp_path / name / "model.safetensors")
    assert found["two"].keys() == found["alone"].keys()
    assert all(torch.equal(tensor, found["two"][name]) for name, tensor in found["alone"].items())
