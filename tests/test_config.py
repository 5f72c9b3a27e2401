"""Every dialect of quantization_config is read; what cannot be used is refused in one clear sentence."""

from __future__ import annotations

import contextlib
import enum
import json
import time
from typing import Any

import pytest

from gptq_backend import ConfigError, QuantizeConfig


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ({"bits": 3, "group_size": 64}, {"bits": 3, "group_size": 64}),
        ({"wbits": 2, "groupsize": 32}, {"bits": 2, "group_size": 32}),
        ({"w_bit": 8, "q_group_size": -1}, {"bits": 8, "group_size": -1}),
        ({"bits": 4, "wbits": 8}, {"bits": 4}),
        ({"bits": 4, "format": "gptq_v2"}, {"checkpoint_format": "gptq_v2"}),
        ({"bits": 4, "checkpoint_format": "GPTQ_V2", "format": "gptq"}, {"checkpoint_format": "gptq_v2"}),
        ({"bits": 4, "checkpoint_format": None}, {"checkpoint_format": "gptq"}),
        ({"bits": 4, "pack_dtype": "torch.int16"}, {"pack_dtype": "int16"}),
        ({"bits": 4, "desc_act": True, "act_group_aware": True}, {"desc_act": True, "act_group_aware": False}),
        ({"bits": 4, "percdamp": 0.05}, {"damp_percent": 0.05}),
        ({"bits": 4, "act_order": True}, {"desc_act": True}),
        ({"bits": 4, "quant_method": "gptq", "autoround_version": "0.4"}, {"bits": 4}),
        ({"bits": 4, "method": "GPTQ"}, {"bits": 4}),
        (
            {"bits": 4, "modules_in_block_to_quantize": [["a.q", "a.k"], ["b"]]},
            {"modules_in_block_to_quantize": ("a.q", "a.k", "b")},
        ),
        ({"bits": 4, "modules_in_block_to_quantize": ["a.q", "b"]}, {"modules_in_block_to_quantize": ("a.q", "b")}),
    ],
)
def test_dialects(source: dict[str, Any], expected: dict[str, Any]) -> None:
    config = QuantizeConfig.from_dict(source)
    assert {key: getattr(config, key) for key in expected} == expected


@pytest.mark.parametrize(
    "source",
    [
        {"bits": "3", "group_size": "-1", "sym": "false", "damp_percent": "0.1", "desc_act": "True"},
        {"bits": 3.0, "group_size": -1.0, "sym": 0, "damp_percent": 0.1, "desc_act": 1.0},
        {"wbits": " 3 ", "groupsize": "-1.0", "sym": "False", "percdamp": "1e-1", "act_order": "TRUE"},
    ],
)
def test_numbers_and_booleans_may_be_strings_or_floats(source: dict[str, Any]) -> None:
    config = QuantizeConfig.from_dict(source)
    assert (config.bits, config.group_size, config.sym, config.damp_percent, config.desc_act) == (
        3, -1, False, 0.1, True,
    )  # fmt: skip
    assert all(type(value) is int for value in (config.bits, config.group_size))


def test_marlin_as_a_format_is_refused_with_the_way_out() -> None:
    with pytest.raises(ConfigError, match=r"^checkpoint_format='marlin' is not supported.*find the original\)$"):
        QuantizeConfig(checkpoint_format="marlin")


@pytest.mark.parametrize("source", [None, "gptq", 4, ["bits"], [{"bits": 4}], True])
def test_settings_that_are_no_object_are_refused(source: Any) -> None:
    with pytest.raises(ConfigError, match="quantization_config is .*, expected an object"):
        QuantizeConfig.from_dict(source)


@pytest.mark.parametrize("overrides", [{"dynamic": {}}, {"dynamic": {".*": {"bits": 8}}}, {"dynamic": 5}])
def test_a_rule_has_no_rules_of_its_own(overrides: dict[str, Any]) -> None:
    found = QuantizeConfig.from_dict({"bits": 4, "dynamic": {".*": {"bits": 3, **overrides}}}).for_module("layer")
    assert found is not None
    assert (found.bits, found.dynamic) == (3, None)


@pytest.mark.parametrize(
    "pattern",
    [
        r"(a+)+$",
        r"(\w+\.?)+X",
        r"(.*)*\.nope$",
        r"(.*?,?){60}[!?]",
        r"((.|.)*)*(?<!j)",
        r"(.?){40}(.?){40}!?(?!)",
    ],
)
def test_a_pattern_is_matched_or_refused_in_bounded_time(pattern: str) -> None:
    start = time.process_time()
    config = QuantizeConfig(dynamic={pattern: {"bits": 8}})
    with contextlib.suppress(ConfigError):
        for i in range(2000):
            config.for_module(f"model.layers.{i}.self_attn.q_proj_and_a_longer_name_than_usual_{'a' * (i % 40)}")
    assert time.process_time() - start < 5


def test_a_pattern_that_would_run_for_years_is_named() -> None:
    config = QuantizeConfig(dynamic={r"(.*?,?){60}[!?]": {"bits": 8}})
    with pytest.raises(ConfigError, match=r"dynamic: matching names against '.*60.*' takes too long; write it"):
        config.for_module("model.layers.10.self_attn.q_proj_" + "a" * 40)


@pytest.mark.parametrize(
    "pattern", ["(" * 5000, "(" * 400 + ")" * 400, "a{99999999999}", "[", "*", r"\1", "x" * 100_000]
)
def test_what_is_no_pattern_is_refused_in_one_sentence(pattern: str) -> None:
    with pytest.raises(ConfigError, match="dynamic: ") as found:
        QuantizeConfig(dynamic={pattern: {}})
    assert len(str(found.value)) < 300
    assert "\n" not in str(found.value)


def test_enum_values_of_frameworks_are_read() -> None:
    class Method(enum.Enum):
        GPTQ = "gptq"

    assert QuantizeConfig.from_dict({"bits": 4, "quant_method": Method.GPTQ}).bits == 4


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"bits": 9}, r"bits=9.*\(2, 3, 4, 5, 6, 7, 8\)"),
        ({"bits": "four"}, "bits='four'"),
        ({"bits": "4.5"}, "bits='4.5'"),
        ({"bits": float("nan")}, "bits=nan"),
        ({"bits": [4]}, r"bits=\[4\]"),
        ({"bits": True}, "bits=True"),
        ({"bits": 4, "sym": "yes"}, "sym='yes'.*True or False"),
        ({"bits": 4, "checkpoint_format": "exl2"}, "exl2.*gptq_v2"),
        ({"bits": 4, "quant_method": "hqq"}, "hqq.*gptq"),
        ({"bits": 4, "dynamic": {"+:(": {"bits": 8}}}, r"'\('.*regular expression"),
        ({"bits": 4, "dynamic": {"q_proj": None}}, "'q_proj': None is not a regex with a mapping"),
        ({"bits": 4, "dynamic": {5: {"bits": 8}}}, "5: .* is not a regex with a mapping"),
    ],
)
def test_refusals_name_the_key_the_value_and_the_way_out(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizeConfig.from_dict(source)


WRITE_ONLY = [
    ({"group_size": 0}, "group_size=0"),
    ({"group_size": -2}, "group_size=-2.*-1"),
    ({"group_size": 64.5}, "group_size=64.5 is not supported; use -1 or a positive integer"),
    ({"group_size": {}}, "group_size={} is not"),
    ({"quality": "superb"}, "quality='superb'.*'fast', 'default', 'best'"),
    ({"quality": ["best"]}, r"quality=\['best'\]"),
    ({"search_finalists": 0}, "search_finalists=0.*at least 1"),
    ({"search_finalists": True}, "search_finalists=True"),
    ({"refine_sweeps": -1}, "refine_sweeps=-1"),
    ({"refine_sweeps": 1.5}, "refine_sweeps=1.5"),
    ({"distill_epochs": "two"}, "distill_epochs='two'"),
    ({"damp_percent": 0}, "damp_percent=0"),
    ({"damp_percent": 1.5}, "damp_percent=1.5"),
    ({"damp_percent": float("inf")}, "damp_percent=inf"),
    ({"damp_percent": "x"}, "damp_percent='x'"),
    ({"damp_percent": []}, r"damp_percent=\[\]"),
    ({"desc_act": "yes"}, "desc_act='yes'.*True or False"),
    ({"lm_head": {}}, "lm_head={}"),
    ({"pack_dtype": "int4"}, "int4.*int32"),
    ({"modules_in_block_to_quantize": [None]}, r"modules_in_block_to_quantize=\[None\]"),
    ({"modules_in_block_to_quantize": 5}, "modules_in_block_to_quantize=5"),
    ({"keep_edge_blocks": -1}, "keep_edge_blocks"),
    ({"scale_search": "mse"}, "scale_search='mse'.*True or False"),
    ({"signed_scales": "no"}, "signed_scales='no'.*None"),
    ({"act_group_aware": "auto"}, "act_group_aware='auto'"),
]


@pytest.mark.parametrize(("source", "message"), WRITE_ONLY)
def test_what_only_a_run_needs_is_refused_for_a_run_but_not_in_a_checkpoint(
    source: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizeConfig(**source)
    read = QuantizeConfig.from_dict({"bits": 3, **source})
    assert (read.bits, read.preset) == (3, QuantizeConfig().preset)
    assert {key: read.to_dict()[key] for key in source} == source, "lost when written back"
    with pytest.raises(ConfigError, match=message):
        read.check_quantizer_settings()
    rule = QuantizeConfig.from_dict({"bits": 4, "dynamic": {".*": {"bits": 3, **source}}}).for_module("layer")
    assert rule is not None
    assert rule.bits == 3
    with pytest.raises(ConfigError, match=message):
        rule.check_quantizer_settings()


def test_zero_and_one_are_read_as_flags() -> None:
    config = QuantizeConfig.from_dict({"bits": 4, "sym": 0, "desc_act": 1})
    assert (config.sym, config.desc_act) == (False, True)
    with pytest.raises(ConfigError, match="sym=0"):
        QuantizeConfig(sym=0)  # type: ignore[arg-type]


def test_group_aware_and_desc_act_exclude_each_other() -> None:
    with pytest.raises(ConfigError, match="act_group_aware and desc_act"):
        QuantizeConfig(desc_act=True, act_group_aware=True)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, True),
        ({"desc_act": True}, False),
        ({"static_groups": True}, False),
        ({"static_groups": True, "act_group_aware": True}, True),
        ({"act_group_aware": False}, False),
    ],
)
def test_group_aware_is_the_default_where_nothing_else_orders(options: dict[str, bool], expected: bool) -> None:
    assert QuantizeConfig(**options).group_aware is expected


RULES = {
    "-:.*down_proj": {},
    "+:model\\.layers\\.0\\..*": {"bits": 8, "groupsize": 32},
    ".*q_proj": {"bits": 3},
    "lm_head": {"sym": False},
}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.0.mlp.down_proj", None),  # the first match wins, also over a later override
        ("model.layers.0.self_attn.q_proj", (8, 32, True)),
        ("model.layers.1.self_attn.q_proj", (3, 128, True)),
        ("model.layers.1.self_attn.k_proj", (4, 128, True)),
        ("lm_head", (4, 128, False)),
        ("model.lm_head", (4, 128, True)),  # re.match: anchored at the start
    ],
)
def test_dynamic_rules(name: str, expected: tuple[int, int, bool] | None) -> None:
    found = QuantizeConfig(dynamic=RULES).for_module(name)
    assert (None if found is None else (found.bits, found.group_size, found.sym)) == expected


def test_a_rule_with_desc_act_conflicts_with_the_default_order() -> None:
    source = {"bits": 4, "act_group_aware": True, "dynamic": {"q": {"desc_act": True}}}
    rule = QuantizeConfig.from_dict(source).for_module("q")
    assert rule is not None
    assert rule.desc_act
    assert not rule.group_aware


@pytest.mark.parametrize(
    "settings", [{"bits": 5}, {"bits": "6"}, {"dynamic": {"q_proj": {"bits": 7}}}, {"embed_bits": 5}, {"w_bit": 6}]
)
@pytest.mark.parametrize("label", ["gptq", "gptq_v2", "gptq_p"])
def test_the_label_of_a_file_is_trusted_whatever_its_bits(settings: dict[str, Any], label: str) -> None:
    config = QuantizeConfig.from_dict({"checkpoint_format": label, **settings})
    rule = config.for_module("k_proj")
    assert rule is not None
    assert (config.checkpoint_format, rule.checkpoint_format) == (label, label)


def test_dynamic_override_with_a_bad_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="bits=9"):
        QuantizeConfig(dynamic={".*": {"bits": 9}}).for_module("layer")


def test_unknown_keys_are_kept_and_written_back() -> None:
    source = {"bits": 4, "quant_method": "gptq", "meta": {"quantizer": ["gptqmodel:7.7"]}, "uri": "https://example.org"}
    written = QuantizeConfig.from_dict(source).to_dict()
    assert {key: written[key] for key in source} == source


@pytest.mark.parametrize(
    "config",
    [
        QuantizeConfig(),
        QuantizeConfig(bits=3, group_size=-1, sym=False, desc_act=True, checkpoint_format="gptq_p", lm_head=True),
        QuantizeConfig(dynamic=RULES, modules_in_block_to_quantize=("a.q", "b"), keep_edge_blocks=1),
    ],
)
def test_written_dictionary_is_json_and_reads_back(config: QuantizeConfig) -> None:
    written = json.loads(json.dumps(config.to_dict()))
    again = QuantizeConfig.from_dict(written)
    assert again.to_dict() == config.to_dict()
    assert written["checkpoint_format"] == written["format"] == config.checkpoint_format
    assert written["quant_method"] == "gptq"


def test_a_setting_made_by_hand_wins_over_what_the_quality_stands_for() -> None:
    plain, mixed = QuantizeConfig(quality="fast"), QuantizeConfig(quality="fast", refine_sweeps=3, signed_scales=True)
    assert (plain.preset.refine_sweeps, plain.preset.signed_scales, plain.preset.search_finalists) == (0, False, 1)
    assert (mixed.preset.refine_sweeps, mixed.preset.signed_scales, mixed.preset.search_finalists) == (3, True, 1)
    assert QuantizeConfig(quality="best", distill_epochs=0).preset.distill_epochs == 0


def test_quality_and_what_was_set_by_hand_survive_a_file() -> None:
    config = QuantizeConfig(quality="best", refine_sweeps=1)
    read = QuantizeConfig.from_dict(json.loads(json.dumps(config.to_dict())))
    assert (read.quality, read.refine_sweeps, read.preset) == ("best", 1, config.preset)


def test_a_rule_that_sets_what_is_for_the_whole_run_is_named() -> None:
    config = QuantizeConfig(dynamic={r".*\.a": {"block_epochs": 0, "bits": 8}, r".*\.b": {"quality": "fast"}})
    found = config.unused_rules(["x.a", "x.b"])
    assert found == [r"the rule '.*\\.a' sets what is the same for all layers: block_epochs"]
