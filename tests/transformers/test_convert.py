"""``convert``: every format that is read into every one that is written, and what the report says of it."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from gptq_backend import CheckpointError, ConfigError, GPTQError, QuantEmbedding, QuantizeConfig, QuantLinear
from gptq_transformers import from_quantized, quantize
from gptq_transformers.converting import TARGETS, convert
from gptq_transformers.converting.plain_names import PlainNames
from gptq_transformers.converting.source import StoredSource
from tests.transformers.checkpoints import PEERS, VERSION_4, distance, logits, peer_error, tiny
from tests.transformers.test_other_formats import BOUND, FORMATS, NAMES, error
from tests.transformers.tiny_gguf import write_gguf


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


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


PLANAR = {"gptq-5bit": 5, "gptq-7bit": 7}


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
    assert len(report.notes) == (name in PLANAR and to != "gptq_p")
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


# Phi-3's gate and up, which the model has in one; experts that the model's own loader calls otherwise.
@pytest.mark.parametrize("name", ["phi3-4-32", "mixtral-4-32", "llama-embed-both"])
def test_a_dense_checkpoint_has_the_names_of_plain_transformers(name: str, tmp_path: Path) -> None:
    report = convert(PEERS / name, tmp_path / "out", "bf16")
    assert 0 < report.relative < 2**-8
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert peer_error(model, name) < 0.02


def test_a_dense_checkpoint_that_plain_transformers_would_not_find_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(StoredSource, "plain_names", lambda self: PlainNames())
    with pytest.raises(ConfigError, match=r"gate_up_proj.* would be missing\), and cannot be written as such"):
        convert(PEERS / "phi3-4-32", tmp_path / "out", "bf16")
    assert not (tmp_path / "out").exists()


# -- embeddings --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "own head"])
def embedded(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with an 8-bit embedding."""
    folder = tmp_path_factory.mktemp("embedded")
    tiny(tie_word_embeddings=request.param).save_pretrained(folder / "source")
    settings = QuantizeConfig(bits=4, group_size=32, embed_bits=8, quality="fast", lm_head=not request.param)
    quantize(folder / "source", settings, [torch.arange(3, 35)[None]], output=folder / "model")
    return folder / "model"


@pytest.mark.parametrize("to", ["awq", "compressed-tensors"])
def test_what_cannot_hold_a_quantized_embedding_names_the_option(embedded: Path, to: str, tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=rf"embed_tokens is a quantized embedding, which {to} cannot hold.*--embed-bits 16"
    ):
        convert(embedded, tmp_path / "out", to)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("to", ["gptq", "gptq_v2", "awq", "compressed-tensors", "bf16"])
def test_an_embedding_goes_back_to_16_bits(embedded: Path, to: str, tmp_path: Path) -> None:
    before = from_quantized(embedded, dtype=torch.float32)
    if to == "awq" and not before.config.tie_word_embeddings:
        with pytest.raises(ConfigError, match="lm_head is quantized, expected it in 16 bits, as all readers of AWQ"):
            convert(embedded, tmp_path / "out", to, embed_bits=16)
        return
    report = convert(embedded, tmp_path / "out", to, embed_bits=16)
    assert "model.embed_tokens" not in report.differences
    after = from_quantized(tmp_path / "out", dtype=torch.float32) if to != "bf16" else plain(tmp_path / "out")
    rows = before.get_input_embeddings()(torch.arange(before.config.vocab_size))
    kept = torch.bfloat16 if to == "bf16" else torch.float16
    assert torch.equal(after.get_input_embeddings().weight, rows.to(kept).float())
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert "embed" not in json.dumps(config.get("quantization_config", {}))
    assert after.config.tie_word_embeddings == before.config.tie_word_embeddings
    assert distance(logits(after), logits(before)) < 0.05


def test_an_embedding_stays_quantized_between_the_formats_of_gptq(embedded: Path, tmp_path: Path) -> None:
    assert convert(embedded, tmp_path / "out", "gptq_v2").exact
    found, expected = (from_quantized(folder, dtype=torch.float32) for folder in (tmp_path / "out", embedded))
    assert isinstance(found.get_input_embeddings(), QuantEmbedding)
    assert torch.equal(logits(found), logits(expected))


def test_a_tied_head_is_named_as_one_that_is_not_quantized(tmp_path: Path) -> None:
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path / "source")
    quantize(tmp_path / "source", QuantizeConfig(group_size=32), [torch.arange(3, 35)[None]], output=tmp_path / "in")
    for to, key in (("awq", "modules_to_not_convert"), ("compressed-tensors", "ignore")):
        convert(tmp_path / "in", tmp_path / to, to)
        config = json.loads((tmp_path / to / "config.json").read_text())
        assert config["quantization_config"][key] == ["lm_head"]


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


def test_a_folder_inside_the_input_is_no_part_of_itself(tmp_path: Path) -> None:
    folder = tmp_path / "a folder"
    shutil.copytree(FORMATS / "awq-gemm", folder)
    for name in ("pytorch_model.bin", "original.pth", "x.gguf", "model.safetensors.index.json"):
        (folder / name).write_bytes(b"stale")
    (folder / "tokenizer.model").write_bytes(b"kept")
    assert convert(folder, folder / "the output", "gptq").exact
    names = {path.name for path in (folder / "the output").iterdir()}
    assert names == {"config.json", "model.safetensors", "tokenizer.model"}


def _damaged(tmp_path: Path, name: str, change: Any) -> Path:
    folder = tmp_path / "in"
    shutil.copytree(FORMATS / name, folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


LAYER = "model.layers.0.self_attn.v_proj"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("awq-gemm-bias", lambda t: t.pop(f"{LAYER}.bias"), "v_proj: bias is missing, though the model has one"),
        ("marlin", lambda t: t.pop(f"{LAYER}.B"), "v_proj.weight is not in the checkpoint"),
        ("marlin", lambda t: t.update({f"{LAYER}.B": t[f"{LAYER}.B"].long()}), "v_proj.weight is not in the check"),
        (
            "marlin",
            lambda t: t.update({f"{LAYER}.B": t[f"{LAYER}.B"][:-1]}),
            "v_proj: the checkpoint has 240 inputs",
        ),
        (
            "awq-gemm",
            lambda t: t["model.norm.weight"].fill_(float("nan")),
            "model.norm.weight: 64 values in model.safet",
        ),
        ("awq-gemm", lambda t: t[f"{LAYER}.scales"].fill_(float("nan")), "scales: .* values are NaN or infinite"),
    ],
)
@pytest.mark.parametrize("to", ["gptq", "bf16"])
def test_what_does_not_fit_the_model_is_refused_before_anything_is_written(
    name: str, change: Any, message: str, to: str, tmp_path: Path
) -> None:
    folder = _damaged(tmp_path, name, change)
    with pytest.raises(CheckpointError, match=message):
        convert(folder, tmp_path / "out", to)
    assert not (tmp_path / "out").exists()


def test_scales_that_float16_cannot_hold_are_no_awq(tmp_path: Path) -> None:
    folder = _damaged(tmp_path, "ct-w4a16-group", lambda t: t[f"{LAYER}.weight_scale"].fill_(1e6))
    with pytest.raises(ConfigError, match="v_proj has scales that float16 cannot hold"):
        convert(folder, tmp_path / "out", "awq")


def test_a_model_that_transformers_does_not_know_is_converted(tmp_path: Path) -> None:
    folder = _damaged(tmp_path, "awq-gemm", lambda t: None)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "nobody_knows"}))
    assert convert(folder, tmp_path / "out", "gptq").exact


def test_a_dense_model_is_sent_to_quantize(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "in")
    with pytest.raises(ConfigError, match=r"is not quantized; expected a quantized checkpoint: quantize it"):
        convert(tmp_path / "in", tmp_path / "out")


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


def _bent(tmp_path: Path, after: bytes, skip: int, kind: str, value: int) -> Path:
    """A file with another number so many bytes after a name."""
    write_gguf(tmp_path / "in.gguf", "Q8_0")
    data = bytearray((tmp_path / "in.gguf").read_bytes())
    struct.pack_into(kind, data, data.index(after) + len(after) + skip, value)
    (tmp_path / "in.gguf").write_bytes(data)
    return tmp_path / "in.gguf"


@pytest.mark.parametrize(
    ("after", "skip", "kind", "value", "message"),
    [
        (b"GGUF\3\0\0\0", 0, "<Q", 2**60, "ends at byte .* expected .* more after byte 24"),
        (b"GGUF\3\0\0\0", 8, "<Q", 2**60, "ends at byte .* expected .* more after byte 24"),
        (b"GGUF", 0, "<I", 3 << 24, r"has version 50331648, expected one of \(2, 3\) in little-endian order"),
        (b"llama.block_count", 4, "<I", 10**9, "says llama.block_count=1000000000, but holds only 12 tensors"),
        (b"llama.vocab_size", 4, "<I", 7, r"embed_tokens.weight has shape \[64, 256\], expected \[7, 256\]"),
        (b"llama.attention.head_count_kv", 4, "<I", 2**31, "expected|cannot be loaded"),
        (b"blk.0.attn_q.weight", 0, "<I", 9, "has a tensor of 9 dimensions"),
        (b"blk.0.attn_q.weight", 4, "<Q", 2**50, "bytes, expected at least .* with all its tensors"),
        (b"blk.0.attn_q.weight", 4, "<Q", 0, r"q_proj.weight has shape \[256, 0\], expected \[256, 256\]"),
        (b"blk.0.attn_q.weight", 4, "<Q", 128, r"q_proj.weight has shape \[256, 128\], expected \[256, 256\]"),
        (b"blk.0.attn_q.weight", 20, "<I", 77, "cannot be loaded: .*77"),
        (b"blk.0.attn_q.weight", 24, "<Q", 2**62, "bytes, expected at least .* with all its tensors"),
        (b"general.architecture", 12, "<I", 0x6D756C6C, "cannot be loaded: .*not supported yet"),
    ],
)
def test_a_gguf_file_that_lies_is_refused_at_once(
    after: bytes, skip: int, kind: str, value: int, message: str, tmp_path: Path
) -> None:
    pytest.importorskip("gguf")
    file = _bent(tmp_path, after, skip, kind, value)
    with pytest.raises(GPTQError, match=message):
        convert(file, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in.gguf"}


@pytest.mark.parametrize("size", [0, 10, 24, 200, 700, 200_000, -1])
def test_a_truncated_gguf_file_is_refused(size: int, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "in.gguf", "Q8_0")
    (tmp_path / "in.gguf").write_bytes((tmp_path / "in.gguf").read_bytes()[:size])
    with pytest.raises(GPTQError, match=r"in.gguf (does not begin|ends at byte|has \d+ bytes|cannot be loaded)"):
        convert(tmp_path / "in.gguf", tmp_path / "out")


@pytest.mark.parametrize("to", ["gptq", "bf16"])
def test_scales_that_are_no_numbers_are_no_exact_conversion(to: str, tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "in.gguf", "Q8_0")
    data = bytearray((tmp_path / "in.gguf").read_bytes())
    data[-34:-32] = struct.pack("<e", float("nan"))  # of the last block
    (tmp_path / "in.gguf").write_bytes(data)
    with pytest.raises(CheckpointError, match="lm_head: 1 of its scales or values are NaN or infinite"):
        convert(tmp_path / "in.gguf", tmp_path / "out", to)


def test_a_gguf_file_is_known_by_a_name_in_capitals_too(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    write_gguf(tmp_path / "Model.GGUF", "Q4_0")
    assert convert(tmp_path / "Model.GGUF", tmp_path / "out").exact


def test_a_file_that_is_no_gguf_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf")
    (tmp_path / "model.gguf").write_bytes(b"nothing")
    with pytest.raises(Exception, match=r"model.gguf does not begin like a GGUF file"):
        convert(tmp_path / "model.gguf", tmp_path / "out")
