"""The command ``inspect`` as a user types it: what is stored, and what is wrong with it."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from safetensors.torch import load_file, save_file

from tests.cli.command import CHECKPOINTS, run


def _inspect(folder: Path) -> dict:
    result = run("inspect", folder, "--json", "-")
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def _edited(name: str, folder: Path, **settings: object) -> Path:
    """A copy of a checkpoint with other quantization settings in both of its config files."""
    copy = shutil.copytree(CHECKPOINTS / name, folder / name)
    for file, key in (("config.json", "quantization_config"), ("quantize_config.json", None)):
        content = json.loads((copy / file).read_text())
        (content[key] if key else content).update(settings)
        (copy / file).write_text(json.dumps(content))
    return copy


def _edit_tensors(folder: Path, **changes: torch.Tensor) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors.update({name.replace("__", "."): value for name, value in changes.items()})
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize(
    ("name", "bits", "group_size", "sym", "act_order"),
    [
        ("llama-4-32-sym", 4, 32, True, False),
        ("llama-3-32-sym", 3, 32, True, False),
        ("llama-4-32-asym-v2", 4, 32, False, False),
        ("llama-4-64-actorder", 4, 64, True, True),
        ("qwen2-4-64", 4, 64, True, False),
        ("opt-4-32", 4, 32, True, False),
    ],
)
def test_inspect_reads_what_is_stored(name: str, bits: int, group_size: int, sym: bool, act_order: bool) -> None:
    found = _inspect(CHECKPOINTS / name)
    assert {(m["bits"], m["group_size"], m["sym"], m["act_order"]) for m in found["modules"]} == {
        (bits, group_size, sym, act_order)
    }
    assert found["odd"] == []
    assert found["damaged"] == {}
    assert sum(row["modules"] for row in found["kernels"]["cpu"]) == found["quantized_modules"]


def test_inspect_sees_rules_and_trivial_act_order() -> None:
    modules = {module["name"]: module for module in _inspect(CHECKPOINTS / "llama-dynamic")["modules"]}
    assert modules["model.layers.1.mlp.up_proj"]["bits"] == 8
    assert "model.layers.0.self_attn.o_proj" not in modules
    (sentence,) = _inspect(CHECKPOINTS / "llama-4-32-static-actorder")["odd"]
    assert "desc_act is true, but the g_idx of all 14 modules is trivial" in sentence


@pytest.mark.skipif(transformers.__version__.startswith("4."), reason="version 4 reads another number of experts in it")
def test_inspect_lists_experts() -> None:
    names = [module["name"] for module in _inspect(CHECKPOINTS / "qwen3_moe-4-32")["modules"]]
    assert "model.layers.0.mlp.experts.3.down_proj" in names


def test_inspect_names_mislabelled_zeros(tmp_path: Path) -> None:
    (sentence,) = _inspect(_edited("llama-4-32-sym", tmp_path, checkpoint_format="gptq_v2", format="gptq_v2"))["odd"]
    assert "checkpoint_format is gptq_v2, but all 14 modules store zeros minus one (gptq)" in sentence


def test_inspect_names_settings_that_the_tensors_contradict(tmp_path: Path) -> None:
    folder = _edited("llama-4-32-asym-v2", tmp_path, sym=True, group_size=64, lm_head=True)
    odd = "\n".join(_inspect(folder)["odd"])
    assert "sym is true, but the zeros of all 14 modules vary" in odd
    assert "all 14 modules have group_size 32 by their shapes" in odd
    assert "lm_head is true, but lm_head is not quantized" in odd


def test_inspect_names_files_that_disagree_and_settings_out_of_sight(tmp_path: Path) -> None:
    folder = _edited("llama-4-32-sym", tmp_path)
    other = json.loads((folder / "quantize_config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps({**other, "desc_act": True}))
    assert _inspect(folder)["odd"] == ["desc_act is False in config.json (used) and True in quantize_config.json"]
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    (folder / "config.json").write_text(json.dumps(config))
    assert "plain from_pretrained does not see them" in _inspect(folder)["odd"][0]


def test_inspect_names_a_method_that_plain_loading_does_not_know(tmp_path: Path) -> None:
    (sentence,) = _inspect(_edited("llama-4-32-sym", tmp_path, quant_method="GPTQ"))["odd"]
    assert "quant_method is 'GPTQ' in config.json, not 'gptq'" in sentence


def test_inspect_names_spurious_biases_and_extra_tensors(tmp_path: Path) -> None:
    folder = _edited("llama-4-32-sym", tmp_path)
    name = "model__layers__0__self_attn__q_proj"
    _edit_tensors(folder, **{f"{name}__bias": torch.zeros(128, dtype=torch.float16), f"{name}__perm": torch.zeros(1)})
    odd = "\n".join(_inspect(folder)["odd"])
    assert "have a bias of zeros, though the model has none; it is dropped" in odd
    assert "1 tensors beside those of GPTQ, ignored: model.layers.0.self_attn.q_proj.perm" in odd


def test_inspect_lists_damage_without_hiding_the_rest(tmp_path: Path) -> None:
    folder = _edited("llama-4-32-sym", tmp_path)
    scales = load_file(folder / "model.safetensors")["model.layers.0.self_attn.q_proj.scales"]
    _edit_tensors(folder, model__layers__0__self_attn__q_proj__scales=scales.fill_(float("nan")))
    result = run("inspect", folder, "--json", "-")
    assert result.exit_code == 1
    found = json.loads(result.stdout)
    assert found["quantized_modules"] == 13
    assert "NaN or infinite" in found["damaged"]["model.layers.0.self_attn.q_proj"]
    assert result.stderr.startswith("error: 1 modules cannot be used")


def test_inspect_prints_every_module_once(tmp_path: Path) -> None:
    result = run("inspect", CHECKPOINTS / "llama-4-64-actorder", "--device", "cpu", "--device", "cuda")
    assert result.exit_code == 0, result.output
    assert len(re.findall(r"^model\.layers\.\S+ +4 +64 +sym +yes", result.stdout, re.MULTILINE)) == 14
    assert "odd: nothing" in result.stdout
    assert re.search(r"cuda: \w+ serves 14 modules", result.stdout)
