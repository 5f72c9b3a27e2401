"""Experts by other names than the model's: what is understood gives the same logits, the rest is named."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM

from gptq_backend import CheckpointError
from gptq_cli.checkpoint import read_checkpoint
from gptq_transformers.loading.checkpoint_names import expert_places
from tests.transformers.toy_experts import FUSED, PROJECTIONS, check_dequantized, logits, needs_fused, quantized

Tensors = dict[str, Tensor]
PARTS = ("qweight", "qzeros", "scales", "g_idx", "bias")


def names(model: str) -> list[str]:
    return PROJECTIONS.get(model, ["gate_proj", "up_proj", "down_proj"])


def rewrite(folder: Path, change: Callable[[Tensors], Tensors]) -> None:
    file = folder / "model.safetensors"
    save_file({key: value.contiguous() for key, value in change(load_file(file)).items()}, file, {"format": "pt"})


def renamed(tensors: Tensors, template: str, spelling: tuple[str, ...], model: str) -> Tensors:
    """Each ``experts.N.PROJECTION`` called by ``template``, with {n} for the number and {p} for the projection."""
    found = {}
    for key, value in tensors.items():
        if match := re.search(r"(.*\.experts)\.(\d+)\.(\w+)\.(\w+)$", key):
            place, number, projection, part = match.groups()
            called = template.format(n=number, p=spelling[names(model).index(projection)])
            key = f"{place}.{called}.{part}"
        found[key] = value
    return found


def joined(tensors: Tensors, model: str, interleaved: bool, template: str) -> Tensors:
    """Gate and up of each expert in one matrix."""
    gate, up, down = names(model)
    found = {}
    for key, value in tensors.items():
        match = re.search(r"(.*\.experts)\.(\d+)\.(\w+)\.(\w+)$", key)
        if match is None:
            found[key] = value
        elif match[3] == down:
            found[f"{match[1]}.{template.format(n=match[2], p='down_proj')}.{match[4]}"] = value
        elif match[3] == gate:
            other = tensors[f"{match[1]}.{match[2]}.{up}.{match[4]}"]
            both = value
            if match[4] != "g_idx":
                both = torch.stack([value, other], -1).flatten(-2) if interleaved else torch.cat([value, other], -1)
            found[f"{match[1]}.{template.format(n=match[2], p='gate_up_proj')}.{match[4]}"] = both
    return found


@torch.no_grad()
def check(folder: Path, expected: Tensor) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-4)
    checkpoint = read_checkpoint(folder)
    assert not checkpoint.damaged
    assert not checkpoint.skipped
    model.save_pretrained(folder / "again")  # whatever it is called there, it loads
    again = AutoModelForCausalLM.from_pretrained(folder / "again", dtype=torch.float32)
    torch.testing.assert_close(logits(again), expected, rtol=1e-4, atol=1e-4)
    check_dequantized(again, folder / "dense")


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize(
    ("template", "spelling"),
    [
        ("{n}.{p}", ("gate_proj", "up_proj", "down_proj")),
        ("{n}.{p}", ("w1", "w3", "w2")),
        ("{p}.{n}", ("w1", "v1", "w2")),
        ("{p}.{n}", ("gate_projs", "up_projs", "down_projs")),
        ("mlp.{p}.{n}", ("w1", "v1", "w2")),
    ],
)
def test_experts_by_any_known_name_give_the_same_logits(
    model: str, template: str, spelling: tuple[str, ...], tmp_path: Path
) -> None:
    expected = quantized(model, tmp_path)
    rewrite(tmp_path, lambda tensors: renamed(tensors, template, spelling, model))
    check(tmp_path, expected)


@pytest.mark.parametrize(("model", "parent"), [("mixtral", "mlp"), ("qwen3_moe", "block_sparse_moe")])
@pytest.mark.parametrize("spelling", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_experts_in_another_module_of_the_block_give_the_same_logits(
    model: str, parent: str, spelling: tuple[str, ...], tmp_path: Path
) -> None:
    expected = quantized(model, tmp_path)
    rewrite(tmp_path, lambda tensors: renamed(tensors, "{n}.{p}", spelling, model))
    rewrite(
        tmp_path,
        lambda tensors: {re.sub(r"\.(mlp|block_sparse_moe)\.", f".{parent}.", k): v for k, v in tensors.items()},
    )
    check(tmp_path, expected)


@torch.no_grad()
@pytest.mark.parametrize(("model", "parent"), [("mixtral", "mlp"), ("qwen3_moe", "block_sparse_moe")])
def test_the_base_model_loads_from_the_file_of_the_whole_and_the_whole_from_that_of_the_base(
    model: str, parent: str, tmp_path: Path
) -> None:
    quantized(model, tmp_path)
    rewrite(
        tmp_path,
        lambda tensors: {re.sub(r"\.(mlp|block_sparse_moe)\.", f".{parent}.", k): v for k, v in tensors.items()},
    )
    inputs = torch.arange(8)[None]
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    expected = whole.model(inputs).last_hidden_state
    base = AutoModel.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(base(inputs).last_hidden_state, expected)
    if not FUSED:  # transformers 4 takes a file of the base model with a head for a damaged one
        return
    rewrite(tmp_path, lambda tensors: {key.removeprefix("model."): value for key, value in tensors.items()})
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(again.model(inputs).last_hidden_state, expected)


@needs_fused
@pytest.mark.parametrize("template", ["{n}.{p}", "{p}.{n}", "{p}s.{n}"])
@pytest.mark.parametrize(("model", "interleaved"), [("mixtral", False), ("gpt_oss", True)])
def test_gate_and_up_in_one_matrix_give_the_same_logits(
    model: str, interleaved: bool, template: str, tmp_path: Path
) -> None:
    expected = quantized(model, tmp_path, sym=True)
    rewrite(tmp_path, lambda tensors: joined(tensors, model, interleaved, template))
    check(tmp_path, expected)


DENSE = {r"-:.*experts": {}}


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
@pytest.mark.parametrize("spelling", [("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")])
def test_experts_that_are_all_dense_have_any_name_too(model: str, spelling: tuple[str, ...], tmp_path: Path) -> None:
    expected = quantized(model, tmp_path, dynamic=DENSE)
    rewrite(tmp_path, lambda tensors: renamed(tensors, "{n}.{p}", spelling, model))
    check(tmp_path, expected)


def test_dense_experts_are_computed_in_the_dtype_of_the_model(tmp_path: Path) -> None:
    quantized("qwen3_moe", tmp_path, dynamic=DENSE)
    rewrite(tmp_path, lambda tensors: {k: v.bfloat16() if "experts" in k else v for k, v in tensors.items()})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert {parameter.dtype for name, parameter in model.named_parameters() if "experts" in name} == {torch.float32}


@pytest.mark.parametrize("settings", [{}, {"dynamic": DENSE}])
@needs_fused
def test_experts_that_are_not_in_the_file_are_told(settings: dict[str, Any], tmp_path: Path) -> None:
    quantized("qwen3_moe", tmp_path, **settings)
    rewrite(tmp_path, lambda tensors: {k: v for k, v in tensors.items() if not re.search(r"experts\.[123]\.", k)})
    with pytest.raises(CheckpointError, match=r"mlp\.experts: the checkpoint has 1 of the model's 4 experts"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "1 of the model's 4 experts" in next(iter(read_checkpoint(tmp_path).damaged.values()))


@pytest.mark.parametrize("model", ["mixtral", "qwen3_moe"])
def test_names_that_nobody_knows_are_told(model: str, tmp_path: Path) -> None:
    quantized(model, tmp_path)
    rewrite(tmp_path, lambda tensors: renamed(tensors, "{n}.{p}", ("alpha", "beta", "gamma"), model))
    with pytest.raises(CheckpointError, match=r"calls the layers of its experts \{\}\.alpha, \{\}\.beta, \{\}\.gamma"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "alpha" in next(iter(read_checkpoint(tmp_path).damaged.values()))


@pytest.mark.skipif(FUSED, reason="transformers 5 takes both")
def test_one_matrix_where_the_model_has_two_is_told(tmp_path: Path) -> None:
    quantized("mixtral", tmp_path)
    rewrite(tmp_path, lambda tensors: joined(tensors, "mixtral", False, "{n}.{p}"))
    with pytest.raises(CheckpointError, match=r"have the matrices \{\}\.gate_up_proj, \{\}\.down_proj, the model's"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_experts_that_only_the_model_calls_so_are_no_obstacle() -> None:
    """A model with code of its own, whose experts have names that are in no table."""
    model = nn.Module()
    model.experts = nn.ModuleList(
        nn.ModuleDict({name: nn.Linear(8, 8) for name in ("alpha", "beta", "gamma")}) for _ in range(2)
    )
    layers = [f"experts.{n}.{name}" for n in range(2) for name in ("alpha", "beta", "gamma")]
    assert expert_places(model, layers) == {}
