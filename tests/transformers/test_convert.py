"""``convert``: every format that is read into every one that is written, and what the report says of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from transformers import AutoModelForCausalLM

from gptq_backend import CheckpointError, ConfigError, QuantLinear
from gptq_transformers import from_quantized
from gptq_transformers.converting import TARGETS, convert
from tests.transformers.checkpoints import PEERS, VERSION_4, distance, logits, peer_error
from tests.transformers.test_other_formats import BOUND, FORMATS, NAMES, error
from tests.transformers.tiny_gguf import write_gguf

# What AWQ cannot hold: other widths than 4 bits, act-order, groups of several sizes.
NOT_AS_AWQ = {
    "auto-round-asym",
    "ct-mixed",
    "ct-w4a16-actorder",
    "ct-w8a16-channel",
    "gptq-5bit",
    "gptq-7bit",
    "marlin",
}


@pytest.mark.parametrize("to", [name for name in TARGETS if name != "bf16"])
@pytest.mark.parametrize("name", NAMES)
def test_another_tools_checkpoint_is_converted_exactly(name: str, to: str, tmp_path: Path) -> None:
    if to == "awq" and name in NOT_AS_AWQ:
        with pytest.raises(ConfigError, match=r"convert to gptq or compressed-tensors instead"):
            convert(FORMATS / name, tmp_path / "out", to)
        assert not any(tmp_path.iterdir())
        return
    report = convert(FORMATS / name, tmp_path / "out", to)
    assert report.exact
    assert report.notes == []
    assert error(from_quantized(tmp_path / "out", dtype=torch.float32), name) < BOUND


# transformers 4 does not know the settings of experts in a dense model's config.json of version 5.
@pytest.mark.parametrize("name", [name for name in NAMES if not (VERSION_4 and "moe" in name)])
def test_a_dense_checkpoint_is_the_rounded_weights(name: str, tmp_path: Path) -> None:
    report = convert(FORMATS / name, tmp_path / "out", "bf16")
    assert not report.exact
    assert 0 < report.relative < 2**-8  # half a unit of bfloat16's last place
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert error(model, name) < 0.02


@pytest.mark.parametrize("name", ["llama-4-32-asym-v2", "llama-4-64-actorder", "llama-dynamic", "qwen3_moe-4-32"])
@pytest.mark.parametrize("to", ["gptq", "gptq_v2", "compressed-tensors"])
def test_a_gptq_checkpoint_is_converted_exactly(name: str, to: str, tmp_path: Path) -> None:
    assert convert(PEERS / name, tmp_path / "out", to).exact
    assert peer_error(from_quantized(tmp_path / "out", dtype=torch.float32), name) < BOUND


def test_gptq_and_awq_are_the_way_there_and_back(tmp_path: Path) -> None:
    convert(FORMATS / "awq-gemm", tmp_path / "gptq", "gptq_v2")
    convert(tmp_path / "gptq", tmp_path / "awq", "awq")
    first, last = (load_file(folder / "model.safetensors") for folder in (FORMATS / "awq-gemm", tmp_path / "awq"))
    assert first.keys() == last.keys()
    assert all(torch.equal(first[key], last[key]) for key in first)


# -- the packages of the formats read what was written -----------------------------------------------------------------


@pytest.mark.skipif(VERSION_4, reason="its loader of compressed-tensors is another")
@pytest.mark.parametrize("name", ["awq-gemm", "ct-mixed", "ct-w8a16-channel", "auto-round-asym"])
def test_the_package_compressed_tensors_reads_what_was_written(name: str, tmp_path: Path) -> None:
    pytest.importorskip("compressed_tensors")
    convert(FORMATS / name, tmp_path / "out", "compressed-tensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert error(model, name) < BOUND


def test_the_settings_of_a_mixed_checkpoint_name_every_layer(tmp_path: Path) -> None:
    convert(FORMATS / "ct-mixed", tmp_path / "out", "gptq_v2")
    settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    rules = settings["dynamic"]
    assert rules["-:^model\\.layers\\.0\\.mlp\\.down_proj$"] == {}
    assert settings["bits"] == 4  # of most layers
    assert {rule["bits"] for pattern, rule in rules.items() if pattern.startswith("+")} == {8}


def test_zeros_that_other_readers_may_misread_are_said(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (folder / "config.json").write_text((FORMATS / "awq-gemm" / "config.json").read_text())
    from safetensors.torch import save_file

    tensors = load_file(FORMATS / "awq-gemm" / "model.safetensors")
    tensors["model.layers.0.mlp.up_proj.qzeros"].zero_()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    report = convert(folder, tmp_path / "out", "gptq")
    assert report.exact
    assert len(report.notes) == 1
    assert "1 layers have zeros of 0" in report.notes[0]
    assert convert(folder, tmp_path / "v2", "gptq_v2").notes == []


# -- files -------------------------------------------------------------------------------------------------------------


def test_other_files_come_along_and_outdated_ones_do_not(tmp_path: Path) -> None:
    convert(FORMATS / "auto-round-gptq", tmp_path / "out", "gptq")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"config.json", "model.safetensors"}
    convert(PEERS / "llama-4-32-sym", tmp_path / "peer", "gptq_v2")
    names = {path.name for path in (PEERS / "llama-4-32-sym").iterdir()}
    assert {path.name for path in (tmp_path / "peer").iterdir()} >= names - {"quantize_config.json"} - {
        name for name in names if name.startswith("quant")
    }


@pytest.mark.parametrize(
    ("model", "to", "message"),
    [
        (FORMATS / "awq-gemm", "exl2", r"to='exl2' is not a format that can be written"),
        (FORMATS, "gptq", r"holds no config.json"),
    ],
)
def test_what_cannot_be_converted_is_refused(model: Path, to: str, message: str, tmp_path: Path) -> None:
    with pytest.raises((ConfigError, CheckpointError), match=message):
        convert(model, tmp_path / "out", to)
    assert not any(tmp_path.iterdir())


# -- GGUF --------------------------------------------------------------------------------------------------------------


def as_transformers_reads(file: Path) -> nn.Module:
    model: Any = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    return model


@pytest.mark.parametrize("kind", ["Q4_0", "Q5_0", "Q8_0"])
def test_blocks_with_a_scale_are_converted_exactly(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "model.gguf", kind)
    report = convert(tmp_path / "model.gguf", tmp_path / "out", "gptq")
    assert report.exact
    tokens = torch.arange(3, 40)[None]
    expected = logits(as_transformers_reads(tmp_path / "model.gguf"), tokens)
    assert distance(logits(from_quantized(tmp_path / "out", dtype=torch.float32), tokens), expected) < BOUND


@pytest.mark.parametrize("kind", ["Q4_1", "Q5_1"])
def test_blocks_with_a_minimum_are_rounded_and_it_is_said(kind: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "model.gguf", kind, embedding="Q8_0")
    report = convert(tmp_path / "model.gguf", tmp_path / "out", "gptq_v2")
    assert 0 < report.relative < 1 / 128
    assert f"blocks of type {kind} have minimums" in report.notes[0]
    assert [*report.dense] == ["model.embed_tokens.weight"]
    tokens = torch.arange(3, 40)[None]
    expected = logits(as_transformers_reads(tmp_path / "model.gguf"), tokens)
    assert distance(logits(from_quantized(tmp_path / "out", dtype=torch.float32), tokens), expected) < 0.05


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"nothing")
    with pytest.raises(Exception, match=r"model.gguf cannot be loaded"):
        convert(tmp_path / "model.gguf", tmp_path / "out")
