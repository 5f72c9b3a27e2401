"""The command ``tune`` where there is no GPU, and what it would measure."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("typer")

from gptq_backend.bench import plans
from gptq_backend.kernels.cuda.plan import Plan
from gptq_cli.checkpoint import read_checkpoint
from gptq_cli.tune_command import as_json, layers, line
from tests.cli.command import run

CHECKPOINT = "tests/data/checkpoints/llama-4-32-sym"


@pytest.mark.skipif(torch.cuda.is_available(), reason="measures")
@pytest.mark.parametrize("arguments", [(), (CHECKPOINT,), ("--shapes", "llama2-7b"), ("--device", "cpu")])
def test_without_a_gpu_it_says_so_in_a_sentence(arguments: tuple[str, ...]) -> None:
    done = run("tune", *arguments)
    assert done.exit_code == 1
    assert done.stderr.startswith("error: tune measures the CUDA kernels, which do not serve --device c")
    assert len(done.stderr.strip().splitlines()) == 1


def test_wrong_options_are_errors_before_the_work() -> None:
    assert "is not NxK" in run("tune", "--shape", "3").stderr
    assert "expected (2, 3, 4, 8)" in run("tune", "--bits", "5").stderr
    assert "is not a folder" in run("tune", "nothing-there").stderr


def test_the_layers_of_a_checkpoint_are_measured_once_and_joined_as_vllm_joins_them() -> None:
    found = layers(read_checkpoint(CHECKPOINT).layers)
    shapes = [(each.N, each.K) for each in found]
    assert len(set(shapes)) == len(shapes)
    separate = {(64, 128), (128, 128), (256, 128), (128, 256)}
    assert set(shapes) == separate | {(128 + 64 + 64, 128), (256 + 256, 128)}
    assert {(each.bits, each.group_size, each.dtype) for each in found} == {(4, 32, "fp16")}


def test_a_line_says_what_is_gained() -> None:
    usual, best = Plan(1, 1, 16), Plan(2, 1, 4)
    assert line(plans.Choice(1, best, 1e-5, usual, 2e-5)).split()[:3] == ["M=1", "10.0", "us"]
    assert "2.00x as fast as usual: Plan(strips=2" in line(plans.Choice(1, best, 1e-5, usual, 2e-5))
    assert "the usual plan" in line(plans.Choice(8, usual, 1e-5, usual, 1e-5))
    assert "did not run" in line(plans.Choice(8, None, 1e-5, usual, None))
    assert as_json(plans.Choice(8, None, 1e-5, usual, None))["usual_us"] is None
