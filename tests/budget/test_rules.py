"""Each layer gets what was chosen for it, under its own name and under those of layers that readers join."""

from __future__ import annotations

import re
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptq_backend import QuantizeConfig
from gptq_backend.budget.rules import dynamic_rules
from gptq_backend.budget.storage import STORAGES, Storage

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LLAMA = (ATTENTION, ("self_attn.o_proj",), ("mlp.gate_proj", "mlp.up_proj"), ("mlp.down_proj",))
EXPERTS = tuple(f"mlp.experts.{i}.{name}_proj" for i in range(3) for name in ("gate", "up", "down"))
SHARED = ("mlp.shared_expert.gate_proj", "mlp.shared_expert.up_proj")
MIXTURE = (ATTENTION, ("self_attn.o_proj",), EXPERTS, SHARED, ("mlp.shared_expert.down_proj",))
PARALLEL = (("attn.q_proj", "attn.k_proj", "attn.v_proj", "mlp.fc_in"), ("attn.out_proj",), ("mlp.fc_out",))
BLOCKS = {"llama": LLAMA, "mixture": MIXTURE, "parallel": PARALLEL}
# What vLLM asks for, beside the names in the file, and the layer that it is made of.
JOINED = {
    "llama": {"self_attn.qkv_proj": ATTENTION[0], "mlp.gate_up_proj": "mlp.gate_proj"},
    "mixture": {
        "self_attn.qkv_proj": ATTENTION[0],
        "mlp.experts": EXPERTS[0],
        "mlp.shared_expert.gate_up_proj": SHARED[0],
    },
    "parallel": {"attn.qkv_proj": "attn.q_proj"},
}


def as_others_read(rules: dict[str, Any], name: str) -> dict[str, int]:
    """The first match, as GPTQModel and vLLM look for it."""
    return next(value for pattern, value in rules.items() if re.match(pattern.removeprefix("+:"), name))


@pytest.mark.parametrize("kind", BLOCKS)
@given(data=st.data())
def test_every_name_has_the_rule_of_its_group(kind: str, data: st.DataObject) -> None:
    groups = [
        (f"model.layers.{i}", [f"model.layers.{i}.{name}" for name in members], data.draw(st.sampled_from(STORAGES)))
        for i in range(12)
        for members in BLOCKS[kind]
    ]
    rules = dict(dynamic_rules(groups))
    config = QuantizeConfig(dynamic=rules)
    expected = {name: storage for _, members, storage in groups for name in members}
    for name, storage in expected.items():
        own = config.for_module(name)
        assert own is not None
        assert (own.bits, own.group_size) == (storage.bits, storage.group_size)
        assert as_others_read(rules, name) == storage.settings
    for i in range(12):
        for joined, member in JOINED[kind].items():
            storage = expected[f"model.layers.{i}.{member}"]
            assert as_others_read(rules, f"model.layers.{i}.{joined}") == storage.settings
    assert len(rules) <= len(BLOCKS[kind]) * len(STORAGES)


def test_vllm_finds_the_rules_of_layers_that_it_joins() -> None:
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.gptq_utils")
    groups = [
        ("h.0", [f"h.0.{name}" for name in ATTENTION], Storage(64, 3)),
        ("h.0", ["h.0.self_attn.o_proj"], Storage(32, 2)),
    ]
    config = QuantizeConfig(dynamic=dynamic_rules(groups))
    assert utils.get_dynamic_override(config, "h.0.self_attn.qkv_proj", "bits") == 3
    assert utils.get_dynamic_override(config, "h.0.self_attn.o_proj", "group_size") == 32


def test_a_joined_layer_has_the_rule_of_its_innermost_parent_however_many_names_the_outer_one_leaves_out() -> None:
    members = ["h.0.attn.q", "h.0.attn.k"]
    rules = dict(dynamic_rules([("h.0", members, Storage(64, 3)), ("h.0", ["h.0.fc1", "h.0.fc2"], Storage(32, 2))]))
    assert as_others_read(rules, "h.0.attn.qk") == as_others_read(rules, "h.0.attn.q") == Storage(64, 3).settings
    assert as_others_read(rules, "h.0.fc1") == Storage(32, 2).settings


def test_layers_with_rules_of_their_own_are_left_to_them() -> None:
    groups = [("h.0", ["h.0.mlp.up", "h.0.mlp.gate"], Storage(64, 3))]
    rules = {"h\\.0\\.mlp\\.down": {"bits": 8}, **dynamic_rules(groups, ["h.0.mlp.down"])}
    config = QuantizeConfig(dynamic=rules)
    assert [config.for_module(f"h.0.mlp.{name}").bits for name in ("up", "down")] == [3, 8]  # type: ignore[union-attr]


def test_names_of_blocks_in_two_lists_and_at_the_root_are_told_apart() -> None:
    groups = [(block, [f"{block}.q"], Storage(32, 2 + i)) for i, block in enumerate(("encoder.1", "decoder.1", "1"))]
    config = QuantizeConfig(dynamic=dynamic_rules(groups))
    found = [config.for_module(f"{block}.q").bits for block in ("encoder.1", "decoder.1", "1")]  # type: ignore[union-attr]
    assert found == [2, 3, 4]
