"""The command ``tune`` where there is no GPU, and what it would measure."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

pytest.importorskip("typer")

from gptq_backend import GPTQError, QuantizeConfig
from gptq_backend.bench import Problem, plans
from gptq_backend.format.stored_tensors import encode
from gptq_backend.kernels.cuda.plan import Plan
from gptq_cli.checkpoint import Layer, read_checkpoint
from gptq_cli.tune_command import Measured, as_json, layers, line, tune, tune_all
from gptq_transformers import quantize
from tests.cli.command import run
from tests.format.test_stored_tensors import random_weight
from tests.transformers.checkpoints import tiny

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


def named(name: str, bits: int = 4, out_features: int = 64, checkpoint_format: str = "gptq", size: int = 32) -> Layer:
    spec, _ = encode(random_weight(bits, 128, out_features, size), checkpoint_format)
    return Layer(name, spec, spec)


def test_codes_of_6_bits_are_measured_with_the_8_that_they_have_in_memory() -> None:
    (found,) = layers([named("a.o_proj", 6, checkpoint_format="gptq_p")])
    assert (found.bits, found.N, found.K) == (8, 64, 128)


def test_only_layers_that_are_stored_alike_are_joined() -> None:
    alike = [named(f"a.{name}") for name in ("q_proj", "k_proj", "v_proj")]
    assert [(each.N, each.K) for each in layers(alike)] == [(64, 128), (192, 128)]
    for other in (named("a.v_proj", bits=8), named("a.v_proj", size=64)):
        assert [each.N for each in layers([*alike[:2], other])] == [64, 64]
    assert len(layers(alike[:2])) == 1


def test_an_embedding_is_measured_only_if_a_head_multiplies_by_it() -> None:
    checkpoint = read_checkpoint("tests/data/checkpoints/llama-embed-both")
    assert checkpoint.looked_up == {"model.embed_tokens"}
    assert "lm_head" in {layer.name for layer in checkpoint.layers}
    assert read_checkpoint(CHECKPOINT).looked_up == set()


@pytest.mark.parametrize("tied", [True, False])
def test_a_tied_embedding_and_codes_of_6_bits_are_found_in_a_checkpoint(tied: bool, tmp_path: Path) -> None:
    tiny(tie_word_embeddings=tied).save_pretrained(tmp_path / "source")
    config = QuantizeConfig(bits=6, group_size=32, embed_bits=8)
    quantize(tmp_path / "source", config, None, output=tmp_path / "model")
    checkpoint = read_checkpoint(tmp_path / "model")
    assert checkpoint.looked_up == (set() if tied else {"model.embed_tokens"})
    (projection,) = {layer.spec.bits for layer in checkpoint.layers if layer.name.endswith("q_proj")}
    assert projection == 6
    assert {each.bits for each in layers(checkpoint.layers)} == {8}


def test_a_layer_that_cannot_be_measured_is_named_and_the_others_are_measured() -> None:
    said: list[str] = []
    choice = plans.Choice(1, None, 1e-5, None, 1e-5)

    def measure(problem: Problem) -> Measured:
        return ([choice], None) if problem.N == 2 else ([], "no memory")

    found, refused = tune_all([Problem(1, 64), Problem(2, 64), Problem(2, 64)], measure, said.append)
    assert [each["N"] for each in found] == [2]
    assert [(each["N"], each["reason"]) for each in refused] == [(1, "no memory")]
    assert said[0] == "1x64, 4 bits, group 128\n  no memory"
    assert len(said) == 2
    with pytest.raises(GPTQError, match="no layer could be measured: no memory"):
        tune_all([Problem(1, 64)], measure, said.append)


def test_what_the_kernels_refuse_is_a_reason() -> None:
    choices, reason = tune(Problem(64, 64, group_size=64), [1], torch.device("cpu"), 0.001, set())
    assert not choices
    assert reason is not None
    assert "cuda" in reason


def test_a_line_says_what_is_gained() -> None:
    usual, best = Plan(1, 1, 16), Plan(2, 1, 4)
    assert line(plans.Choice(1, best, 1e-5, usual, 2e-5)).split()[:3] == ["M=1", "10.0", "us"]
    assert "2.00x as fast as usual: Plan(strips=2" in line(plans.Choice(1, best, 1e-5, usual, 2e-5))
    assert "the usual plan" in line(plans.Choice(8, usual, 1e-5, usual, 1e-5))
    assert "usual plan did not run (no room): None" in line(plans.Choice(8, None, 1e-5, usual, None, "no room"))
    assert as_json(plans.Choice(8, None, 1e-5, usual, None, "no room"))["usual_us"] is None


def test_a_usual_plan_with_wrong_results_is_said() -> None:
    choice = plans.Choice(8, Plan(2, 1, 4), 1e-5, Plan(1, 1, 16), None, plans.WRONG)
    assert "the usual plan gives wrong results (run gptq-backend doctor): Plan(strips=2" in line(choice)
    assert as_json(choice)["usual_reason"] == "wrong results"
