"""``convert`` of codes that lie in planes: what keeps them, what widens them and what refuses them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gptq_backend import ConfigError, QuantizeConfig
from gptq_transformers import quantize
from gptq_transformers.converting import convert
from tests.transformers.checkpoints import tiny
from tests.transformers.test_convert import PLANAR
from tests.transformers.test_other_formats import FORMATS


@pytest.mark.parametrize("name", PLANAR)
def test_codes_in_planes_become_wider_where_a_format_has_none_and_else_stay(name: str, tmp_path: Path) -> None:
    layer = "model.layers.0.mlp.up_proj.qweight"
    stored = load_file(FORMATS / name / "model.safetensors")[layer]
    for to in ("gptq", "compressed-tensors", "gptq_p"):
        report = convert(FORMATS / name, tmp_path / to, to)
        assert report.exact
        count = sum(f"of {PLANAR[name]} bits became 8 bits wide" in note for note in report.notes)
        assert (len(report.notes), count) == ((0, 0) if to == "gptq_p" else (1, 1))
    assert load_file(tmp_path / "gptq" / "model.safetensors")[layer].shape[0] == 64 * 8 // 32
    assert torch.equal(load_file(tmp_path / "gptq_p" / "model.safetensors")[layer], stored)


@pytest.mark.parametrize("name", PLANAR)
def test_a_format_without_such_codes_names_the_width_in_the_file(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"has {PLANAR[name]} bits, expected what AWQ can hold"):
        convert(FORMATS / name, tmp_path / "out", "awq")


def test_a_layer_that_planes_cannot_hold_is_named_with_the_option(tmp_path: Path) -> None:
    tiny(intermediate_size=72).save_pretrained(tmp_path / "source")
    settings = QuantizeConfig(bits=3, group_size=32, quality="fast")
    quantize(tmp_path / "source", settings, None, output=tmp_path / "model")
    with pytest.raises(ConfigError, match=r"layers\.0\.mlp\.\w+ is \[.*72.*\], .*packs 3-bit .*like --to gptq_v2"):
        convert(tmp_path / "model", tmp_path / "out", "gptq_p")
