"""Blocks that are read one at a time: what loading the whole model would have made of them, in the memory of one."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from gptq_backend import ConfigError, GPTQError, QuantizeConfig
from gptq_backend.model import find_structure
from gptq_transformers import block_reader, quantize, some_experts, streaming
from gptq_transformers.experts.unfuse import unfuse_experts
from tests.toy import listener
from tests.transformers.checkpoints import VERSION_4, ids, tiny

CONFIG = QuantizeConfig(group_size=32, quality="fast")
FEW: dict[str, Any] = {"num_experts_per_tok": 2, "moe_intermediate_size": 32}
# Files with experts one by one, fused, and beside dense blocks; other names in the file; a merged q, k and v.
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, **FEW},
    "qwen2_moe": {"num_experts": 12, "shared_expert_intermediate_size": 64, **FEW},
    "mixtral": {},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 32},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "glm4_moe": {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1, **FEW},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "num_key_value_heads": 2, "first_k_dense_replace": 1,
        "q_lora_rank": 32, "kv_lora_rank": 32, "qk_rope_head_dim": 16, "qk_nope_head_dim": 16, "v_head_dim": 16,
        "head_dim": ..., **FEW,
    },
    "llama4_text": {"num_local_experts": 4, "num_experts_per_tok": 1, "interleave_moe_layer_step": 1},
    "qwen3_5_moe_text": {
        "num_experts": 4, "shared_expert_intermediate_size": 32, "linear_num_key_heads": 2,
        "linear_num_value_heads": 4, "linear_key_head_dim": 16, "linear_value_head_dim": 16, **FEW,
    },
    "jamba": {"num_experts": 4, "num_experts_per_tok": 2, "use_mamba_kernels": False, "mamba_dt_rank": 4},
    "phi3": {},
    "llama": {},
}  # fmt: skip


def saved(folder: Path, family: str) -> Path:
    """A tiny model of that kind in 16 bits."""
    if family not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {family}")
    tiny(family, **{"num_hidden_layers": 3, **FAMILIES[family]}).to(torch.bfloat16).save_pretrained(folder)
    return folder


def stored(folder: Path) -> dict[str, torch.Tensor]:
    return {key: value for file in sorted(folder.glob("*.safetensors")) for key, value in load_file(file).items()}


@pytest.mark.parametrize("family", FAMILIES)
def test_the_checkpoint_is_that_of_a_model_loaded_whole(tmp_path: Path, family: str) -> None:
    source = saved(tmp_path / "source", family)
    whole = AutoModelForCausalLM.from_pretrained(source, dtype="auto")
    quantize(whole, CONFIG, ids(48), output=tmp_path / "whole")
    quantize(source, CONFIG, ids(48), output=tmp_path / "blocks")
    expected, found = stored(tmp_path / "whole"), stored(tmp_path / "blocks")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss", "llama"])
def test_one_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str) -> None:
    """Neither blocks that are to come, nor those that are done, nor anything on disk beside the output."""
    source, blocks = saved(tmp_path / "source", family), {}
    monkeypatch.setenv("TMPDIR", str(tmp_path / "scratch"))
    monkeypatch.setattr("tempfile.tempdir", None)
    (tmp_path / "scratch").mkdir()

    def begin(name: str, block: nn.Module) -> None:
        blocks[name] = block

    def look(*_: Any) -> None:
        *done, current = blocks.values()
        assert not any(tensor.is_meta for tensor in current.parameters())
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if "out.progress" in line]
        assert len(maps) >= len(done)
        scratch = [path for path in (tmp_path / "scratch").rglob("*") if path.is_file()]
        assert not [path for path in scratch if path.stat().st_size > 1000]

    events = listener(block_needed=begin, layer_done=look)
    quantize(source, CONFIG, ids(48), output=tmp_path / "out", events=events)
    assert len(blocks) == 3


@pytest.mark.parametrize("family", [family for family in FAMILIES if family not in ("phi3", "llama")])
def test_a_block_is_read_without_the_experts_that_others_have(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    if VERSION_4 and family in ("gpt_oss", "granitemoe", "llama4_text"):
        pytest.skip("transformers 4 loads models with fused experts as a whole")
    source = saved(tmp_path / "source", family)
    unread: set[str] = set()

    def tensors_but(names: Any, files: Any) -> Any:
        unread.update(names)
        return some_experts.tensors_but(names, files)

    def load(away: set[int]) -> dict[str, torch.Tensor]:
        model, bring = streaming.load_streamed(source, str(tmp_path / "scratch"))
        unfuse_experts(model)
        for block in find_structure(model, CONFIG).blocks:
            experts = [
                t for t in block.targets if (of := re.search(r"\.experts\.(\d+)\.", t.name)) and int(of[1]) in away
            ]
            bring(block.module, frozenset(target.module for target in experts))
            weights = {id(target.module.weight) for target in experts}
            assert all(tensor.is_meta == (id(tensor) in weights) for tensor in block.module.parameters())
        return {name: tensor for name, tensor in model.named_parameters() if not tensor.is_meta}

    expected = load(set())
    monkeypatch.setattr(block_reader, "tensors_but", tensors_but)
    found = load({0, 3})
    assert len(found) < len(expected)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
    by_expert = [name for name in stored(source) if re.search(r"\.experts\.[03]\.", name)]
    assert unread == (set() if VERSION_4 else {*by_expert})


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="reads by accelerate")
def test_weights_that_a_block_lacks_are_named(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "llama")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GPTQError, match=r"its files lack 1 weights .*model\.layers\.1\.mlp\.up_proj\.weight"):
        quantize(source, CONFIG, ids(24), output=tmp_path / "out", events=listener(block_needed=pytest.fail))
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="reads by accelerate")
def test_experts_of_which_one_is_missing_are_named(tmp_path: Path) -> None:
    source = saved(tmp_path / "source", "qwen3_moe")
    tensors = load_file(source / "model.safetensors")
    del tensors["model.layers.1.mlp.experts.2.gate_proj.weight"]
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(GPTQError, match=r"lack tensors.*model\.layers\.1\.mlp\.experts\.gate_up_proj"):
        quantize(source, CONFIG, ids(24), output=tmp_path / "out", events=listener(block_needed=pytest.fail))


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model.layers.0.mlp"], "'model.layers.0.mlp' is no list of blocks.*are model.layers$"),
        (["model.norm"], "'model.norm' is no list of blocks"),
        (["model.layers", "model.layers.0"], "'model.layers' and 'model.layers.0', which lies in it"),
    ],
)
def test_what_cannot_be_blocks_is_refused_before_the_work(tmp_path: Path, names: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        quantize(saved(tmp_path / "source", "llama"), CONFIG, ids(24), block_name=names)


def test_blocks_that_share_weights_are_loaded_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama")
    layers: Any = model.model.layers
    assert streaming._are_apart(model, [*layers])
    layers[1].input_layernorm.weight = layers[0].input_layernorm.weight
    assert not streaming._are_apart(model, [*layers])
    layers[1].input_layernorm.weight = model.model.norm.weight
    assert not streaming._are_apart(model, [*layers])
    layers[1].input_layernorm = layers[0].input_layernorm
    assert not streaming._are_apart(model, [*layers])


def test_no_bar_is_shown_for_each_block(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    source = saved(tmp_path / "source", "llama")
    capfd.readouterr()
    quantize(source, CONFIG, ids(24))
    assert capfd.readouterr().err.count("Loading weights") <= 2  # of one bar, over what is beside the blocks
    assert json.loads((source / "config.json").read_text())["model_type"] == "llama"
