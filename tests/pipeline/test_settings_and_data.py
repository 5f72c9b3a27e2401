"""Settings and calibration data reach the layers: edges, rules, groups, padding, broken activations."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_backend import CalibrationError, ConfigError, RunOptions, quantize_model
from tests.pipeline.hessians import assert_upper_equal, config, quantized_names, second_moments
from tests.toy import VOCABULARY, samples, toy


def test_edge_blocks_stay_dense_and_pass_their_activations_on(hessians: list[Tensor]) -> None:
    model, data = toy(blocks=4), samples()
    quantize_model(model, config(keep_edge_blocks=1, token_weights=False), data)
    assert {name.split(".")[1] for name in quantized_names(model)} == {"1", "2"}
    assert_upper_equal(hessians[0], second_moments(model, ["blocks.1.attn.q"], data)["blocks.1.attn.q"])


def test_only_listed_modules_are_quantized() -> None:
    model = toy()
    quantize_model(model, config(modules_in_block_to_quantize=("attn.o", "mlp.down")), samples())
    assert quantized_names(model) == [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.o", "mlp.down")]


def test_dynamic_rules_reach_the_layers_and_the_report() -> None:
    model = toy()
    rules = {r"-:.*attn\.k": {}, r".*mlp": {"bits": 8, "sym": False}}
    report = quantize_model(model, config(dynamic=rules), samples())
    assert not any(name.endswith("attn.k") for name in quantized_names(model))
    assert {entry.bits for entry in report.layers if ".mlp." in entry.name} == {8}
    assert not model.blocks[0].mlp.up.spec.sym
    assert model.blocks[0].attn.q.spec.sym


@pytest.mark.parametrize("rule", [{"checkpoint_format": "gptq_v2"}, {"pack_dtype": "int8"}])
def test_a_rule_cannot_give_a_layer_a_format_that_readers_would_not_see(rule: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a checkpoint has one"):
        quantize_model(toy(), config(dynamic={".*attn": rule}), samples())


@pytest.mark.parametrize("settings", [{}, {"desc_act": True}, {"static_groups": True}, {"act_group_aware": True}])
def test_group_size_that_does_not_divide_the_features(settings: dict[str, Any]) -> None:
    model, reference = toy(), toy()
    quantize_model(model, config(bits=8, group_size=12, **settings), samples())
    down = model.blocks[0].mlp.down
    assert (down.spec.groups, model.blocks[0].attn.q.spec.groups) == (4, 3)
    ids = torch.stack(samples(2, seed=5))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids), atol=0.02, rtol=0)


def test_same_inputs_give_the_same_bits() -> None:
    states = []
    for _ in range(2):
        model = toy(dtype=torch.float32)
        quantize_model(model, config(desc_act=True), samples())
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# -- calibration data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    plain, padded = toy(), toy()
    data = samples(6, 16)
    settings = config(token_weights=True)
    quantize_model(plain, settings, data)
    batches = []
    for ids in data:
        filler, mask = torch.full((5,), 7), torch.ones(16, dtype=torch.long)
        parts = [(filler, torch.zeros_like(filler)), (ids, mask)]
        parts = parts if side == "left" else parts[::-1]
        batches.append(
            {"input_ids": torch.cat([p[0] for p in parts]), "attention_mask": torch.cat([p[1] for p in parts])}
        )
    report = quantize_model(padded, settings, batches)
    assert {entry.tokens for entry in report.layers} == {6 * 16}
    for name in quantized_names(plain):
        one, other = (model.get_submodule(name).quantized_weight() for model in (plain, padded))
        assert torch.equal(one.codes, other.codes), name


def test_samples_of_different_lengths_all_count() -> None:
    report = quantize_model(toy(), config(), samples(3, 24) + samples(2, 7))
    assert {entry.tokens for entry in report.layers} == {3 * 24 + 2 * 7}


def test_non_finite_activations_are_dropped_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    model.embed.weight.data[5] = torch.nan
    good = samples(4)
    for ids in good:
        ids[ids == 5] = 6
    bad = torch.full((24,), 5)
    with caplog.at_level(logging.WARNING, "gptq_backend"):
        report = quantize_model(model, config(token_weights=True), [*good, bad], options=RunOptions(batch_size=2))
    assert {entry.dropped_tokens for entry in report.layers} == {24}
    assert {entry.tokens for entry in report.layers} == {4 * 24}
    assert "blocks.0.attn.q: dropped 24 " in caplog.text
    clean = toy()
    quantize_model(clean, config(token_weights=True), good, options=RunOptions(batch_size=2))
    for name in quantized_names(clean):
        assert torch.equal(
            clean.get_submodule(name).quantized_weight().codes, model.get_submodule(name).quantized_weight().codes
        )


def test_only_non_finite_activations_name_the_first_layer_and_unhook_the_model() -> None:
    model = toy()
    model.blocks[0].norm1.bias.data[3] = torch.inf
    with pytest.raises(CalibrationError, match=r"blocks\.0\.attn\.q: all 96 calibration tokens"):
        quantize_model(model, config(), samples())
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())


def test_tokens_that_the_model_has_no_row_for_are_said_to_be_so() -> None:
    model = toy()
    with pytest.raises(CalibrationError, match=r"Toy cannot be called with token ids alone \(index out of range"):
        quantize_model(model, config(), [torch.tensor([VOCABULARY + 1])])
    assert not quantized_names(model)
