"""``quantize_head``: the output embedding rounded while a model is loaded, and what is saved of that."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModel

from gptq_backend import ConfigError, QuantizeConfig, QuantLinear
from gptq_backend.algorithm import quantize_weight, round_to_nearest
from gptq_transformers import GPTQConfig
from tests.transformers.checkpoints import distance, load, logits, tiny, write

CONFIG = QuantizeConfig(bits=4, group_size=32, quality="fast")


@pytest.fixture(scope="module", params=[False, True], ids=["own head", "tied head"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    write(folder, tiny(tie_word_embeddings=request.param), CONFIG)
    return folder


def with_head(bits: Any) -> GPTQConfig:
    return GPTQConfig(bits=4, quantize_head=bits)


def divergence(found: Tensor, expected: Tensor) -> float:
    """KL, in nats per token."""
    p = expected.log_softmax(-1)
    return float((p.exp() * (p - found.log_softmax(-1))).sum(-1).mean())


@pytest.mark.parametrize(("bits", "limit"), [(8, 1e-5), (4, 1e-3)])
def test_a_rounded_head_is_close_and_comes_back_from_the_file(
    folder: Path, tmp_path: Path, bits: int, limit: float
) -> None:
    expected = logits(load(folder))
    model = load(folder, quantization_config=with_head(bits))
    head = model.get_output_embeddings()
    assert isinstance(head, QuantLinear)
    assert head.spec.bits == bits
    assert isinstance(model.get_input_embeddings(), nn.Embedding)
    found = logits(model)
    assert 0 < divergence(found, expected) < limit
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert again.get_output_embeddings().stored_spec == head.stored_spec
    assert distance(logits(again), found) < 1e-6
    rounded = again.config.quantization_config.to_quantize_config().for_module("lm_head")
    assert rounded is not None
    assert (rounded.bits, rounded.group_size) == (bits, 64)
    assert "quantize_head" not in again.config.to_dict()["quantization_config"]
    kept = load(tmp_path, quantization_config=with_head(12 - bits)).get_output_embeddings()
    assert kept.spec.bits == bits  # one that is quantized stays as it is


@pytest.mark.parametrize(
    "settings",
    [
        {"bits": 4, "group_size": 64, "dynamic": {"-:.*lm_head.*": {}}},  # which says that the head is not quantized
        {"bits": 8, "group_size": 64, "sym": False, "checkpoint_format": "gptq_v2"},
        {"bits": 4, "group_size": 32, "desc_act": True, "pack_dtype": "int16"},
    ],
    ids=str,
)
def test_the_rounded_head_is_written_as_the_saved_settings_say(settings: dict[str, Any], tmp_path: Path) -> None:
    write(tmp_path / "a", tiny(), QuantizeConfig(quality="fast", **settings))
    model = load(tmp_path / "a", quantization_config=with_head(settings["bits"]))
    said = model.config.quantization_config.to_quantize_config().for_module("lm_head")
    assert (said.sym, said.desc_act) == (True, False)
    model.save_pretrained(tmp_path / "b")
    assert distance(logits(load(tmp_path / "b")), logits(model)) < 1e-6


def test_what_cannot_be_rounded_is_refused(folder: Path) -> None:
    with pytest.raises(ConfigError, match="expected one of"):
        load(folder, quantization_config=with_head(3))
    with pytest.raises(ConfigError, match="no linear output embedding"):
        AutoModel.from_pretrained(folder, quantization_config=with_head(8))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("group_size", [32, -1])
@pytest.mark.parametrize("sym", [True, False])
def test_rounding_to_nearest_is_the_algorithm_without_inputs(bits: int, group_size: int, sym: bool) -> None:
    weight = torch.randn(77, 96, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    config = QuantizeConfig(bits=bits, group_size=group_size, sym=sym, quality="fast")
    found, expected = round_to_nearest(weight, config), quantize_weight(weight, None, config, name="head").weight
    assert torch.equal(found.g_idx, expected.g_idx)
    dense = weight.float()
    assert distance(found.dequantize(), dense) < 1.001 * distance(expected.dequantize(), dense)
