"""Blocks that are written while others are still to come: the same checkpoint, and a model that still works."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoModelForCausalLM, Zamba2Config

from gptq_backend import ConfigError, QuantizeConfig, QuantLinear
from gptq_backend.format.files import checkpoint_files
from gptq_backend.format.headers import read_manifest, read_tensor
from gptq_backend.model import Progress, find_structure
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


@pytest.mark.parametrize("calibrated", [True, False])
def test_finished_blocks_become_the_files_of_the_checkpoint(source, samples, tmp_path, monkeypatch, calibrated):
    data = samples[:2] if calibrated else None
    quantize(source, CONFIG, data, output=tmp_path / "whole")
    monkeypatch.setattr(streaming, "_ONE_FILE_BYTES", 1)
    kept: dict[str, int] = {}  # files of blocks and their inodes

    def look(name, block):
        kept.update({path.name: path.stat().st_ino for path in (tmp_path / "out.progress").glob("*.safetensors")})

    model, _ = quantize(source, CONFIG, data, output=tmp_path / "out", events=listener(block_done=look))
    files = {path.name: path for path in (tmp_path / "out").iterdir()}
    assert len(kept) == 3
    assert set(kept.values()) < {path.stat().st_ino for path in files.values()}  # none was written twice
    manifests = [read_manifest(checkpoint_files(tmp_path / name)) for name in ("out", "whole")]
    assert manifests[0].keys() == manifests[1].keys()
    for name in manifests[0]:
        assert torch.equal(read_tensor(manifests[0][name]), read_tensor(manifests[1][name])), name
    assert {path.name for path in (tmp_path / "whole").iterdir()} - set(files) == {"model.safetensors"}
    assert not [name for name in files if name.startswith("part")]
    index = json.loads(files["model.safetensors.index.json"].read_text())
    assert index["metadata"]["total_size"] == sum(read_tensor(info).nbytes for info in manifests[0].values())
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    # The streamed one runs module by module, the other in few calls where that is possible.
    assert distance(logits(again), logits(model)) < 1e-6
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "whole"}


def test_where_files_cannot_have_two_names_they_are_copied(source, samples, tmp_path, monkeypatch):
    def refuse(*args):
        raise OSError("not supported")

    monkeypatch.setattr(streaming, "_ONE_FILE_BYTES", 1)
    monkeypatch.setattr(streaming.os, "link", refuse)
    model, _ = quantize(source, CONFIG, samples[:2], output=tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert distance(logits(again), logits(model)) < 1e-6


def test_written_blocks_take_no_memory_of_their_own(source, samples, tmp_path):
    model, _ = quantize(source, CONFIG, samples[:2], output=tmp_path / "out")
    maps = mapped_from_files()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            assert any(layer.qweight.data_ptr() in part for part in maps), name


def test_what_only_save_pretrained_can_write_is_left_to_it(source, tmp_path):
    def writer(model):
        return streaming.BlockWriter.of(model, Progress(tmp_path / "p"), find_structure(model, CONFIG))

    model = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    assert writer(model) is not None
    model._weight_conversions = [SimpleNamespace(operations=["joins"], target_patterns=["another"])]
    assert writer(model) is None
    model._weight_conversions = []
    model.model.layers[1].input_layernorm = model.model.layers[0].input_layernorm
    assert writer(model) is None


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


def test_a_failure_leaves_nothing_but_the_finished_blocks(source, samples, tmp_path, caplog):
    def fail(report, done, total):
        if done == total:
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        quantize(source, CONFIG, samples[:2], output=tmp_path / "out", events=listener(layer_done=fail))
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out.progress"}
    assert "out.progress keeps what was done: the same run, begun again, goes on from there" in caplog.text
