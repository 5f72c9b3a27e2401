"""Experts with biases, as gpt-oss has them: by whatever names, on one rank and on two, no bias is lost."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_backend import QuantizeConfig
from tests.transformers.checkpoints import ids, rewrite, tiny, write
from tests.transformers.test_expert_layouts import joined
from tests.transformers.test_split_layers import halves
from tests.vllm.engine import Engine, EngineError
from tests.vllm.test_offline import BOUND, distance

# vLLM knows no gpt-oss without this.
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 64}
YARN |= {"beta_fast": 32.0, "beta_slow": 1.0, "truncate": False}
SMALL = {"num_key_value_heads": 2, "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": 16}


def gpt_oss() -> nn.Module:
    """With weights, sinks and biases that show, and a router that chooses all experts."""
    model = tiny("gpt_oss", rope_parameters=YARN, **SMALL)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.1)
            elif "norm" not in name and "router" not in name:
                parameter.normal_()
    return model


Tensors = dict[str, Tensor]


def both(tensors: Tensors) -> Tensors:
    return joined(tensors, "gpt_oss", True, "{n}.{p}")


def as_gptqmodel_cuts(tensors: Tensors) -> Tensors:
    return halves(tensors)


SETTINGS = {"group_size": 32, "desc_act": True, "sym": False}
CASES: dict[str, tuple[dict[str, Any], Any, dict[str, Any]]] = {
    "as this package writes it": (SETTINGS, None, {}),
    "as GPTQModel cuts it": ({"group_size": 32}, as_gptqmodel_cuts, {"meta": {"quantizer": ["gptqmodel:7.7.0"]}}),
    "gate and up in one": ({"group_size": 32}, both, {}),
    "a dense expert": ({"group_size": 32, "dynamic": {r"-:.*experts\.1\.": {}}}, None, {}),
    "a dense layer": ({"group_size": 32, "dynamic": {r"-:.*layers\.0\..*experts": {}}}, None, {}),
    "dense experts only": ({"group_size": 32, "dynamic": {r"-:.*experts": {}}}, None, {}),
}
IN_SHORT = ("as this package writes it", "as GPTQModel cuts it", "a dense expert")


def made(folder: Path, case: str) -> Tensor:
    settings, change, changed_settings = CASES[case]
    expected = write(folder, gpt_oss(), QuantizeConfig(**settings))[0]
    rewrite(folder, change, **changed_settings)
    return expected


@pytest.mark.parametrize(
    "case", [case if case in IN_SHORT else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_gpt_oss_gives_the_right_logprobs(engine: Engine, case: str, tmp_path: Path) -> None:
    expected = made(tmp_path / "model", case)
    before = engine.logprobs(tmp_path / "model", ids()[0])
    value = distance(before, expected)
    print(f"{case}: {value:.4f}")
    assert value < BOUND
    assert torch.equal(before, engine.logprobs(tmp_path / "model", ids()[0], reload={"path": None}))


@pytest.mark.parametrize("projection", ["gate_proj", "up_proj", "down_proj"])
def test_a_bias_is_not_heard(engine: Engine, projection: str, tmp_path: Path) -> None:
    """That of one expert is enough."""
    expected = made(tmp_path / "model", "as this package writes it")
    key = re.compile(rf"layers\.1\..*experts\.2\.{projection}\.bias")
    rewrite(tmp_path / "model", lambda tensors: {k: v + 2 * bool(key.search(k)) for k, v in tensors.items()})
    assert distance(engine.logprobs(tmp_path / "model", ids()[0]), expected) > BOUND


def test_a_missing_expert_is_named(engine: Engine, tmp_path: Path) -> None:
    made(tmp_path / "model", "as this package writes it")
    name = "model.layers.0.mlp.experts.2.up_proj"
    rewrite(tmp_path / "model", lambda tensors: {k: v for k, v in tensors.items() if not k.startswith(name)})
    with pytest.raises(EngineError, match=f"{name} is not in the checkpoint"):
        engine.logprobs(tmp_path / "model", ids()[0])


@pytest.mark.slow
@pytest.mark.parametrize("expert_parallel", [False, True])
@pytest.mark.parametrize("case", ["as this package writes it", "as GPTQModel cuts it", "gate and up in one"])
def test_two_ranks_compute_what_one_does(pair: Engine, case: str, expert_parallel: bool, tmp_path: Path) -> None:
    expected = made(tmp_path / "model", case)
    found = pair.logprobs(tmp_path / "model", ids()[0], enable_expert_parallel=expert_parallel)
    assert distance(found, expected) < BOUND


@pytest.mark.slow
def test_they_work_in_a_graph(engine: Engine, tmp_path: Path) -> None:
    expected = made(tmp_path / "model", "a dense expert")
    assert distance(engine.logprobs(tmp_path / "model", ids()[0], enforce_eager=False), expected) < BOUND
