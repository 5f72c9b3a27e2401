"""Checkpoints of AWQ, AutoRound, compressed-tensors and Marlin, as their own tools wrote them, in transformers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import gptq_transformers.other_formats as other_formats
from gptq_backend import ConfigError, QuantLinear
from gptq_transformers import from_quantized, merge_adapter
from tests.transformers.checkpoints import distance, logits

FORMATS = Path(__file__).parents[1] / "data" / "formats"
NAMES = sorted(path.name for path in FORMATS.iterdir() if (path / "config.json").is_file())
BOUND = 1e-3  # of logits, from those of the tool's dequantized weights


def error(model: torch.nn.Module, name: str) -> float:
    expected = load_file(FORMATS / f"{name}.expected.safetensors")
    return distance(logits(model, expected["input_ids"]), expected["logits"])


@pytest.fixture
def nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """None of the tools' own packages is installed."""
    monkeypatch.setattr(other_formats, "is_missing", lambda package: True)


@pytest.mark.parametrize("name", NAMES)
def test_plain_from_pretrained_gives_the_tools_logits(name: str, nobody_else: None) -> None:
    model = AutoModelForCausalLM.from_pretrained(FORMATS / name, dtype=torch.float32)
    assert error(model, name) < BOUND
    assert any(isinstance(module, QuantLinear) for module in model.modules())


@pytest.mark.parametrize("name", NAMES)
def test_it_is_saved_as_a_gptq_checkpoint(name: str, tmp_path: Path, nobody_else: None) -> None:
    AutoModelForCausalLM.from_pretrained(FORMATS / name, dtype=torch.float32).save_pretrained(tmp_path)
    again = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert again.config.quantization_config.quant_method == "gptq"
    assert error(again, name) < BOUND


@pytest.mark.parametrize("name", ["gptq-5bit", "gptq-7bit"])
def test_codes_in_planes_are_saved_as_their_tool_stored_them(name: str, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(FORMATS / name, dtype=torch.float32).save_pretrained(tmp_path)
    before, after = (load_file(folder / "model.safetensors") for folder in (FORMATS / name, tmp_path))
    packed = [key for key in before if key.rpartition(".")[2] in ("qweight", "qzeros", "scales", "g_idx")]
    assert packed
    assert all(torch.equal(after[key], before[key]) for key in packed)


def test_from_quantized_serves_though_the_tools_package_is_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_formats, "is_missing", lambda package: False)
    assert error(from_quantized(FORMATS / "ct-w4a16-asym", dtype=torch.float32), "ct-w4a16-asym") < BOUND


def test_an_installed_package_keeps_its_checkpoints(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(other_formats, "is_missing", lambda package: False)
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs

    settings = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "gemm", "zero_point": True}
    assert configs["awq"].from_dict(settings).quant_method == "awq"


def test_what_cannot_be_read_is_left_to_the_stock_way(nobody_else: None) -> None:
    from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING as configs

    settings = {"quant_method": "awq", "bits": 4, "group_size": 128, "version": "llm-awq", "zero_point": True}
    assert not other_formats._serves("awq", settings)
    assert configs["awq"].__name__ == "AwqConfig"


def test_scales_keep_their_type_whatever_the_model_is_loaded_in(nobody_else: None) -> None:
    model = AutoModelForCausalLM.from_pretrained(FORMATS / "awq-gemm", dtype=torch.bfloat16)
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert {layer.stored_spec.scales_dtype for layer in layers} == {torch.float16}
    stored = load_file(FORMATS / "awq-gemm" / "model.safetensors")
    name = "model.layers.0.mlp.up_proj"
    assert torch.equal(model.get_submodule(name).state_dict()["scales"], stored[f"{name}.scales"])


def test_an_adapter_is_merged_into_gptq_only(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"is a checkpoint of awq, expected one of GPTQ; convert it first"):
        merge_adapter(FORMATS / "awq-gemm", tmp_path, tmp_path / "out")


@pytest.mark.slow
def test_nothing_has_to_be_imported(tmp_path: Path) -> None:
    code = (
        "import torch, transformers\n"
        f"model = transformers.AutoModelForCausalLM.from_pretrained({str(FORMATS / 'awq-gemm')!r})\n"
        "print(type(model.model.layers[0].mlp.up_proj).__name__)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert run.stdout.strip().endswith("QuantLinear"), run.stderr[-2000:]
