"""Settings of other tools, as ours or refused."""

from __future__ import annotations

from typing import Any

import pytest

from gptq_backend import ConfigError, QuantizeConfig
from gptq_backend.foreign_settings import gptq_settings

AWQ = {"quant_method": "awq", "bits": 4, "zero_point": True, "version": "gemm"}
COMPRESSED = {"quant_method": "compressed-tensors", "format": "pack-quantized"}


def scheme(**weights: Any) -> dict[str, Any]:
    return {**COMPRESSED, "config_groups": {"group_0": {"targets": ["Linear"], "weights": {"type": "int", **weights}}}}


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"quant_method": "awq", "version": "llm-awq"}, "version='llm_awq' is not a layout of AWQ"),
        ({"quant_method": "auto-round", "packing_format": "auto_round:fp8_static"}, "is not known here"),
        ({"quant_method": "auto-round", "data_type": "mx_fp"}, "data_type='mx_fp' is not known here"),
        ({"quant_method": "auto-round", "act_bits": 8}, "quantizes activations too"),
        ({**COMPRESSED, "format": "float-quantized"}, "format='float-quantized' of compressed-tensors is not known"),
        ({**COMPRESSED}, "expected 'pack-quantized' with integer weights"),
        ({**scheme(num_bits=4), "transform_config": {"config_groups": {"R1": {}}}}, "transform_config"),
        ({**scheme(num_bits=4), "sparsity_config": {"format": "sparse-24-bitmask"}}, "format='sparse-24-bitmask'"),
        ({"quant_method": "hqq"}, "quant_method='hqq' is not supported"),
    ],
)
def test_settings_that_mean_something_else_are_refused(source: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        QuantizeConfig.from_dict(source)


@pytest.mark.parametrize("side", ["input", "output"])
def test_activations_in_few_bits_are_refused(side: str) -> None:
    source = scheme(num_bits=4)
    source["config_groups"]["group_0"][f"{side}_activations"] = {"num_bits": 8}
    with pytest.raises(ConfigError, match="quantizes activations too"):
        QuantizeConfig.from_dict(source)


def test_a_group_in_another_layout_is_refused() -> None:
    source = {**scheme(num_bits=8), "format": "mixed-precision"}
    source["config_groups"]["group_0"]["format"] = "int-quantized"
    with pytest.raises(ConfigError, match="format='int-quantized with mixed-precision' of compressed-tensors"):
        QuantizeConfig.from_dict(source)


def test_the_settings_of_awq_are_known_by_themselves_and_may_be_strings() -> None:
    source = {"zero_point": "true", "q_group_size": "64", "w_bit": 4, "version": "GEMV", "modules_to_not_convert": None}
    config = QuantizeConfig.from_dict(source)
    assert (config.group_size, config.sym, config.extra["awq_version"]) == (64, False, "gemv")
    assert QuantizeConfig.from_dict({**AWQ, "zero_point": None}).sym is False


@pytest.mark.parametrize(
    ("packing", "format"),
    [
        ("auto_round:auto_gptq", "gptq"),
        ("auto_round:exllamav2", "gptq_v2"),
        ("auto_round", "gptq_v2"),
        ("auto_round:gptqmodel", "gptq_v2"),
        ("auto_round:auto_awq", "gptq_v2"),
    ],
)
def test_autorounds_packing_says_what_a_zero_is(packing: str, format: str) -> None:
    found = gptq_settings({"quant_method": "intel/auto-round", "bits": 4, "packing_format": packing})
    assert found["checkpoint_format"] == format


def test_autorounds_own_settings_of_layers_become_rules() -> None:
    extra = {"model.layers.0.mlp.up_proj": {"bits": 16}, "model.layers.1.mlp.up_proj": {"bits": 8, "sym": True}}
    config = QuantizeConfig.from_dict({"quant_method": "auto-round", "bits": 4, "sym": False, "extra_config": extra})
    assert config.for_module("model.layers.0.mlp.up_proj") is None
    eight = config.for_module("model.layers.1.mlp.up_proj")
    assert eight is not None
    assert (eight.bits, eight.sym) == (8, True)
    other = config.for_module("model.layers.11.mlp.up_proj")
    assert other is not None
    assert (other.bits, other.sym) == (4, False)
