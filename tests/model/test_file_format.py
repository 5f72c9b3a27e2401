"""Which format a file gets: planes where a layer of the model needs them, and nothing that nobody asked for."""

from __future__ import annotations

import dataclasses
import logging
from typing import Any

import pytest
import torch

from gptq_backend import ConfigError, QuantizeConfig, QuantLinear, quantize_model
from gptq_backend.model import find_structure
from tests.toy import toy


def config(**settings: Any) -> QuantizeConfig:
    return QuantizeConfig(**{"bits": 4, "group_size": 16, "quality": "fast", **settings})


@pytest.mark.parametrize("rule", [{"bits": 5}, {"bits": 5, "checkpoint_format": "gptq_p"}])
def test_one_layer_in_planes_makes_the_format_of_all_and_that_is_said_once(
    rule: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    model, settings = toy(dtype=torch.float32), config(dynamic={r"blocks\.1\.attn\.q": rule})
    with caplog.at_level(logging.WARNING):
        report = quantize_model(model, settings, None)
    said = "checkpoint_format becomes gptq_p, since blocks.1.attn.q has 5 bits; GPTQModel 7.7 and this package read it"
    assert [text for text in caplog.messages if "checkpoint_format" in text] == [said]
    assert report.config.checkpoint_format == "gptq_p"
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert {(layer.stored_spec.bits, layer.stored_spec.zero_offset) for layer in layers} == {(4, 0), (5, 0)}


@pytest.mark.parametrize("pattern", ["nosuch", r"-:blocks\.1\.attn\.q"])
def test_a_rule_that_no_quantized_layer_follows_says_nothing_of_the_format(
    pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    model = toy(dtype=torch.float32)
    report = quantize_model(model, config(dynamic={pattern: {"bits": 5}}), None)
    assert report.config.checkpoint_format == "gptq"
    assert not any("checkpoint_format" in text for text in caplog.messages)


def test_a_layer_that_has_become_wider_again_leaves_the_format() -> None:
    settings = dataclasses.replace(config(bits=6), bits=4)
    assert find_structure(toy(), settings).checkpoint_format == "gptq"


def test_planes_that_were_asked_for_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    settings = config(bits=4, checkpoint_format="gptq_p", dynamic={r"blocks\.1\.attn\.q": {"bits": 5}})
    assert quantize_model(toy(dtype=torch.float32), settings, None).config.checkpoint_format == "gptq_p"
    assert not any("checkpoint_format" in text for text in caplog.messages)


@pytest.mark.parametrize(
    ("settings", "name"),
    [({"dynamic": {r"blocks\.1\.attn\.q": {"bits": 5}}}, r"blocks\.1\.attn\.q"), ({"embed_bits": 5}, "the embedding")],
)
def test_a_format_that_was_asked_for_and_cannot_hold_a_layer_is_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=f"'gptq_v2' cannot hold {name}.* 5 bits, .*choose 'gptq_p' .--format gptq_p"):
        find_structure(toy(), config(checkpoint_format="gptq_v2", **settings))


def test_an_embedding_in_planes_makes_the_format_of_the_file() -> None:
    assert find_structure(toy(), config(embed_bits=5)).checkpoint_format == "gptq_p"
