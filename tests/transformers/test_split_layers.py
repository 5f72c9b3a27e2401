"""What the model has in one and the checkpoint in parts gives the same logits."""

from __future__ import annotations

import copy
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gptq_backend import QuantizeConfig
from gptq_cli.checkpoint import read_checkpoint
from gptq_transformers.loading.split_layers import JoinedParts
from tests.transformers import toy_experts
from tests.transformers.checkpoints import distance, load, logits, rewrite, stored, tiny, write
from tests.transformers.toy_experts import needs_fused

EXACT = 1e-5
Tensors = dict[str, Tensor]
PARTS = ("gate_proj", "up_proj")


def cut(tensors: Tensors) -> Tensors:
    """``gate_up_proj`` in two layers, packed as before."""
    found = {}
    for key, value in tensors.items():
        if "gate_up_proj" not in key:
            found[key] = value
            continue
        whole = key.endswith("g_idx")
        for part, half in zip(PARTS, (value, value) if whole else value.chunk(2, -1), strict=True):
            found[key.replace("gate_up_proj", part)] = half.clone()
    return found


@pytest.mark.parametrize("desc_act", [False, True])
@pytest.mark.parametrize("model_type", ["phi3", "glm", "glm4"])
def test_gate_and_up_apart_give_the_same_logits(model_type: str, desc_act: bool, tmp_path: Path) -> None:
    expected = write(tmp_path, tiny(model_type), QuantizeConfig(group_size=32, desc_act=desc_act))
    rewrite(tmp_path, cut)
    model = load(tmp_path)
    assert distance(logits(model), expected) < EXACT
    checkpoint = read_checkpoint(tmp_path)
    assert not checkpoint.damaged
    assert not checkpoint.skipped
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        model.model.layers[0].mlp.gate_proj.scales.data.mul_(1)  # whose parts are its own
        twin.model.layers[0].mlp.gate_proj.scales.data.zero_()
        assert distance(logits(model), expected) < EXACT


def test_they_are_saved_as_they_were(tmp_path: Path) -> None:
    expected = write(tmp_path, tiny("phi3"), QuantizeConfig(group_size=32))
    rewrite(tmp_path, cut)
    load(tmp_path).save_pretrained(tmp_path / "again")
    before, after = stored(tmp_path), stored(tmp_path / "again")
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[key]) for key, value in before.items())
    assert distance(logits(load(tmp_path / "again")), expected) < EXACT


@pytest.mark.parametrize("dense", [("up_proj",), PARTS])
def test_a_part_may_be_dense(dense: tuple[str, ...], tmp_path: Path) -> None:
    expected = write(tmp_path, tiny("phi3"), QuantizeConfig(group_size=32))
    weights = {name: module.dequantize().weight for name, module in load(tmp_path).named_modules() if "gate_up" in name}

    def change(tensors: Tensors) -> Tensors:
        tensors = {key: value for key, value in cut(tensors).items() if not re.search(rf"\.({'|'.join(dense)})\.", key)}
        for name, weight in weights.items():
            halves = dict(zip(PARTS, weight.detach().chunk(2), strict=True))
            tensors |= {f"{name.replace('gate_up_proj', part)}.weight": halves[part] for part in dense}
        return tensors

    rewrite(tmp_path, change)
    assert distance(logits(load(tmp_path)), expected) < EXACT


def test_a_dequantized_model_has_its_own_layers_again(tmp_path: Path) -> None:
    expected = write(tmp_path, tiny("phi3"), QuantizeConfig(group_size=32))
    rewrite(tmp_path, cut)
    model = load(tmp_path).dequantize()
    assert not any(isinstance(module, JoinedParts) for module in model.modules())
    assert distance(logits(model), expected) < EXACT
    model.save_pretrained(tmp_path / "dense")
    assert distance(logits(load(tmp_path / "dense")), expected) < EXACT


def test_they_compile_into_one_graph(tmp_path: Path) -> None:
    write(tmp_path, tiny("phi3"), QuantizeConfig(group_size=32))
    rewrite(tmp_path, cut)
    model = load(tmp_path)
    with torch.no_grad():
        assert torch._dynamo.explain(model.model.layers[0].mlp)(torch.randn(1, 3, 64)).graph_break_count == 0


def halves(tensors: Tensors) -> Tensors:
    """What gpt-oss calls gate and up, whose rows alternate in the model, as the halves of all of these rows."""
    found = dict(tensors)
    for key, gate in tensors.items():
        if ".gate_proj." in key and not key.endswith(("g_idx", "qzeros")):  # all zeros of a symmetric grid are alike
            other = key.replace("gate_proj", "up_proj")
            rows = torch.stack([gate, tensors[other]], -1).flatten(-2)
            found[key], found[other] = (half.contiguous() for half in rows.chunk(2, -1))
    return found


@needs_fused
@pytest.mark.parametrize("settings", [{}, {"dynamic": {r"-:.*experts\.1\.": {}}}])
def test_gpt_oss_as_gptqmodel_cuts_it(settings: dict[str, Any], tmp_path: Path) -> None:
    expected = toy_experts.quantized("gpt_oss", tmp_path, sym=True, **settings)
    own = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert distance(toy_experts.logits(own), expected) < EXACT

    def change(tensors: Tensors) -> Tensors:
        dense = {key: value.t() for key, value in tensors.items() if re.search(r"experts\.1\..*\.weight$", key)}
        changed = halves({**tensors, **dense})
        return {key: value.t().contiguous() if key in dense else value for key, value in changed.items()}

    rewrite(tmp_path, change, meta={"quantizer": ["gptqmodel:7.7.0"]})
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert distance(toy_experts.logits(model), expected) < EXACT
    toy_experts.check_dequantized(model, tmp_path / "dense")
