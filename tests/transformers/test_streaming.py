"""Blocks that are written while others are still to come: the same checkpoint, and a model that still works."""

import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Zamba2Config

from gptq_backend import ConfigError, QuantizeConfig, QuantLinear
from gptq_backend.format.files import checkpoint_files
from gptq_backend.format.headers import read_manifest, read_tensor
from gptq_transformers import quantize, streaming
from tests.toy import listener
from tests.transformers.checkpoints import distance
from tests.transformers.test_quantize_pretrained import logits, samples, source

__all__ = ["samples", "source"]  # fixtures
CONFIG = QuantizeConfig(group_size=32, quality="fast")


def mapped_from_files() -> list[range]:
    """Addresses of this process that are maps of weight files."""
    lines = [line for line in Path("/proc/self/maps").read_text().splitlines() if ".safetensors" in line]
    edges = [re.match(r"(\w+)-(\w+)", line).groups() for line in lines]
    return [range(int(first, 16), int(last, 16)) for first, last in edges]


@pytest.mark.parametrize(("shard_bytes", "calibrated"), [(1, True), (50_000, False)])
def test_shards_are_written_on_the_way_and_hold_the_same(
    source, samples, tmp_path, monkeypatch, shard_bytes, calibrated
):
    data = samples[:2] if calibrated else None
    quantize(source, CONFIG, data, output=tmp_path / "whole")
    monkeypatch.setattr(streaming, "_SHARD_BYTES", shard_bytes)
    held, written = [], []

    def look(report, done, total):
        written.append(len(list(tmp_path.glob(".out.*/part-*.safetensors"))))

    add = streaming.BlockWriter.add

    def spied(writer, name, block):
        add(writer, name, block)
        held.append(len({re.match(r"model\.layers\.\d", key)[0] for key in writer.shards.pending}))

    monkeypatch.setattr(streaming.BlockWriter, "add", spied)
    model, _ = quantize(source, CONFIG, data, output=tmp_path / "out", events=listener(layer_done=look))
    assert max(held) == (1 if shard_bytes == 1 else 2)
    assert written[0] == 0
    assert written[-1] == (1 if shard_bytes == 1 else 0)
    manifests = [read_manifest(checkpoint_files(tmp_path / name)) for name in ("out", "whole")]
    assert manifests[0].keys() == manifests[1].keys()
    for name in manifests[0]:
        assert torch.equal(read_tensor(manifests[0][name]), read_tensor(manifests[1][name])), name
    files = {path.name for path in (tmp_path / "out").iterdir()}
    assert {path.name for path in (tmp_path / "whole").iterdir()} - files == {"model.safetensors"}
    assert not [name for name in files if name.startswith("part")]
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["metadata"]["total_size"] == sum(read_tensor(info).nbytes for info in manifests[0].values())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    # The streamed one runs module by module, the other in few calls where that is possible.
    assert distance(logits(again), logits(model)) < 1e-6


def test_written_blocks_take_no_memory_of_their_own(source, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_SHARD_BYTES", 1)
    model, _ = quantize(source, CONFIG, samples[:2], output=tmp_path / "out")
    maps = mapped_from_files()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            on_file = any(layer.qweight.data_ptr() in part for part in maps)
            assert on_file == (".layers.2." not in name), name  # the last block was written, but may stay


def test_what_only_save_pretrained_can_write_is_left_to_it(source, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    assert streaming.BlockWriter.of(model, tmp_path) is not None
    model._weight_conversions = ["renames"]
    assert streaming.BlockWriter.of(model, tmp_path) is None
    model._weight_conversions = []
    model.model.layers[1].mlp = model.model.layers[0].mlp
    assert streaming.BlockWriter.of(model, tmp_path) is None


def test_weights_that_blocks_share_are_refused_before_they_are_read(samples, tmp_path):
    config = Zamba2Config(
        vocab_size=131, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_mem_blocks=1,
        layers_block_type=["hybrid", "hybrid"], mamba_ngroups=1, n_mamba_heads=4, num_attention_heads=4,
        use_shared_attention_adapter=False,
    )  # fmt: skip
    config.save_pretrained(tmp_path / "zamba")  # and no weights
    shared = r"model\.layers\.{}\.shared_transformer\.self_attn\.q_proj"
    with pytest.raises(ConfigError, match=f"{shared.format(0)} and {shared.format(1)} share one weight"):
        quantize(tmp_path / "zamba", CONFIG, samples)


def test_a_failure_between_shards_leaves_nothing(source, samples, tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "_SHARD_BYTES", 1)

    def fail(report, done, total):
        if done == total:
            assert list(tmp_path.glob(".out.*/part-*.safetensors"))
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        quantize(source, CONFIG, samples[:2], output=tmp_path / "out", events=listener(layer_done=fail))
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
