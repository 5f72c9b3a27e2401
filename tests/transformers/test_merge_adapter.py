"""An adapter merged into a GPTQ checkpoint: the result computes what adapter and base did, and nothing else changes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM

from gptq_backend import CalibrationError, CheckpointError, ConfigError, GPTQError, QuantizeConfig, QuantLinear
from gptq_transformers import merge_adapter
from gptq_transformers.merging import plainly_rounded, with_adapter
from tests.transformers.adapters import dense_twin, write_lora
from tests.transformers.checkpoints import PEERS, VERSION_4, VOCABULARY, distance, load, logits, tiny, write

peft: Any = pytest.importorskip("peft", reason="peft computes what an adapter adds; pip install peft")

LAYERS = [f"model.layers.{block}.{layer}" for block in (0, 1) for layer in ("self_attn.q_proj", "mlp.gate_proj")]
SAMPLES = [torch.randint(3, VOCABULARY, (32,), generator=torch.Generator().manual_seed(i)) for i in range(12)]
CONFIGS = {
    "4 bits": QuantizeConfig(bits=4, group_size=32),
    "asymmetric, act-order, rules": QuantizeConfig(
        bits=4, group_size=32, sym=False, desc_act=True, dynamic={r".*q_proj": {"bits": 8, "group_size": 16}}
    ),
    "6 bits, 5 in some layers": QuantizeConfig(bits=6, group_size=32, dynamic={".*gate_proj": {"bits": 5}}),
    "one layer in 16 bits": QuantizeConfig(bits=3, group_size=-1, dynamic={r"-:.*0\.mlp\.gate_proj": {}}),
    "gptq_v2, int64 words, head": QuantizeConfig(
        bits=2, group_size=32, checkpoint_format="gptq_v2", pack_dtype="int64", lm_head=True
    ),
}


@pytest.fixture(scope="module", params=CONFIGS.values(), ids=CONFIGS)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base") / "model"
    write(folder, tiny(), request.param)
    return folder


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "model"
    write(folder, tiny(), CONFIGS["4 bits"])
    return folder


def with_deltas(model: nn.Module, deltas: dict[str, Any]) -> nn.Module:
    twin = dense_twin(model)
    for name, delta in deltas.items():
        twin.get_submodule(name).weight.data += delta
    return twin


@pytest.mark.parametrize("rslora", [False, True])
def test_a_dense_result_computes_what_base_and_adapter_did(base: Path, tmp_path: Path, rslora: bool) -> None:
    deltas = write_lora(tmp_path / "adapter", load(base), LAYERS, use_rslora=rslora)
    expected = logits(with_deltas(load(base), deltas))
    assert distance(logits(with_adapter(base, tmp_path / "adapter")), expected) < 1e-5
    merge_adapter(base, tmp_path / "adapter", tmp_path / "out", to="fp16")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert not any(isinstance(module, QuantLinear) for module in merged.modules())
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    assert distance(logits(merged), expected) < 2e-3


@pytest.mark.parametrize("calibration", [None, SAMPLES], ids=["nearest", "calibrated"])
def test_a_gptq_result_keeps_the_form_of_each_layer_and_all_else_to_the_bit(
    base: Path, tmp_path: Path, calibration: Any
) -> None:
    deltas = write_lora(tmp_path / "adapter", load(base), LAYERS)
    expected = logits(with_deltas(load(base), deltas))
    report = merge_adapter(base, tmp_path / "adapter", tmp_path / "out", calibration)
    before, after = (load_file(folder / "model.safetensors") for folder in (base, tmp_path / "out"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert after[key].dtype == tensor.dtype
        assert after[key].shape == tensor.shape
        if key.rpartition(".")[0] not in LAYERS:
            assert torch.equal(after[key], tensor), key
    assert (base / "config.json").read_bytes() == (tmp_path / "out" / "config.json").read_bytes()
    model, old = load(tmp_path / "out"), load(base)
    for name in LAYERS:
        new_layer, old_layer = model.get_submodule(name), old.get_submodule(name)
        if isinstance(old_layer, QuantLinear):
            assert new_layer.spec.bits == old_layer.spec.bits
            assert new_layer.spec.groups == old_layer.spec.groups
            assert not old_layer.spec.sym or new_layer.spec.sym
    quantized = [name for name in LAYERS if isinstance(old.get_submodule(name), QuantLinear)]
    assert sorted(layer.name for layer in report.layers) == sorted(quantized)
    assert report.dense == [f"{name}.weight" for name in LAYERS if name not in quantized]
    assert distance(logits(model), expected) < distance(logits(old), expected)


@pytest.mark.skipif(VERSION_4, reason="transformers 4 has other names for experts")
@pytest.mark.parametrize("calibration", [None, SAMPLES], ids=["nearest", "calibrated"])
def test_what_experts_learned_is_merged(tmp_path: Path, calibration: Any) -> None:
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
    write(tmp_path / "model", tiny("qwen3_moe", **sizes), QuantizeConfig(bits=8, group_size=32))
    layers = [f"model.layers.0.mlp.experts.{i}.{part}_proj" for i in (1, 3) for part in ("gate", "up", "down")]
    base = load(tmp_path / "model")
    expected = logits(with_deltas(base, write_lora(tmp_path / "adapter", base, layers, scale=0.05)))
    merge_adapter(tmp_path / "model", tmp_path / "adapter", tmp_path / "out", calibration)
    assert distance(logits(load(tmp_path / "out")), expected) < 0.02 < distance(logits(base), expected) / 5


def test_calibration_is_nearer_than_plain_rounding(plain: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "adapter", load(plain), LAYERS, scale=0.0005)
    expected = with_adapter(plain, tmp_path / "adapter")
    merge_adapter(plain, tmp_path / "adapter", tmp_path / "out", SAMPLES)
    samples = torch.stack(SAMPLES)

    def away(model: nn.Module) -> float:
        return distance(logits(model, samples), logits(expected, samples))

    assert away(load(tmp_path / "out")) < away(plainly_rounded(plain, tmp_path / "adapter"))


def test_an_adapter_that_adds_nothing_changes_nothing(plain: Path, tmp_path: Path) -> None:
    """A new grid would cost a whole rounding error."""
    write_lora(tmp_path / "adapter", load(plain), LAYERS, scale=0)
    for calibration in (None, SAMPLES):
        merge_adapter(plain, tmp_path / "adapter", tmp_path / "out", calibration, overwrite=True)
        before, after = (load_file(folder / "model.safetensors") for folder in (plain, tmp_path / "out"))
        assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


@pytest.mark.parametrize(
    "config",
    [
        {"peft_type": "LORA", "use_dora": True},
        {"peft_type": "LOHA"},
        {"peft_type": "LOKR"},
        {"peft_type": "IA3", "feedforward_modules": []},
        {"peft_type": "LORA", "bias": "all", "modules_to_save": ["lm_head"]},
        {"peft_type": "LORA", "target_modules": ["embed_tokens"]},
    ],
    ids=["DoRA", "LoHa", "LoKr", "IA3", "modules_to_save", "embedding"],
)
def test_what_peft_merges_is_merged(plain: Path, tmp_path: Path, config: dict[str, Any]) -> None:
    settings = {"target_modules": ["q_proj", "down_proj"]} | config
    kind = peft.mapping.PEFT_TYPE_TO_CONFIG_MAPPING[settings.pop("peft_type")]
    tuned = peft.get_peft_model(dense_twin(load(plain)), kind(**settings))
    generator = torch.Generator().manual_seed(0)
    for parameter in tuned.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    tuned.save_pretrained(tmp_path / "adapter")
    merge_adapter(plain, tmp_path / "adapter", tmp_path / "out", to="fp16")
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    expected = logits(tuned.eval())
    assert distance(logits(merged), expected) < 3e-3
    assert distance(logits(with_adapter(plain, tmp_path / "adapter")), expected) < 1e-5
    assert distance(logits(load(plain)), expected) > 5e-3


def test_what_cannot_be_merged_is_said_and_nothing_is_written(plain: Path, tmp_path: Path) -> None:
    adapter, out = tmp_path / "adapter", tmp_path / "out"

    def refused(kind: type[Exception], words: str, model: Path = plain, **options: Any) -> None:
        with pytest.raises(kind, match=words):
            merge_adapter(model, adapter, out, **options)
        assert not out.exists()
        assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".out") and path.is_dir()] == []

    refused(CheckpointError, "is no folder; expected that of an adapter")
    adapter.mkdir()
    refused(CheckpointError, "holds no adapter_config.json")
    model = load(plain)
    write_lora(adapter, model, LAYERS)
    refused(ConfigError, "to='int8' is not supported", to="int8")
    refused(CalibrationError, "text= goes with calibration='auto'", text="x")
    tensors = load_file(adapter / "adapter_model.safetensors")
    key = f"base_model.model.{LAYERS[0]}.lora_A.weight"
    save_file(tensors | {key: torch.ones(4, 63)}, adapter / "adapter_model.safetensors")
    refused(CheckpointError, r"lora_A.weight of shape \[4, 63\], expected \[4, 64\]")
    save_file(
        tensors | {"base_model.model.model.layers.7.x.lora_A.weight": torch.ones(1)},
        adapter / "adapter_model.safetensors",
    )
    refused(CheckpointError, "has 1 tensors for what the base model does not have")
    save_file(tensors | {key: torch.full((4, 64), torch.nan)}, adapter / "adapter_model.safetensors")
    refused(GPTQError, "peft cannot merge the adapter in .* into model.layers.0.self_attn.q_proj: NaNs detected")
    prompt = {"peft_type": "PROMPT_TUNING", "task_type": "CAUSAL_LM", "num_virtual_tokens": 4}
    (adapter / "adapter_config.json").write_text(json.dumps(prompt))
    refused(ConfigError, "is PROMPT_TUNING, which adds to the prompt and not to weights")
    tiny().save_pretrained(tmp_path / "dense")
    refused(ConfigError, "is not quantized; merge the adapter with peft", model=tmp_path / "dense")
    with pytest.raises(CheckpointError, match="is or holds the adapter"):
        merge_adapter(plain, adapter, adapter)


def test_without_peft_the_error_says_how_to_get_it(plain: Path, tmp_path: Path) -> None:
    write_lora(tmp_path / "adapter", load(plain), LAYERS)
    code = (
        "import sys; sys.modules['peft'] = None; from gptq_transformers import merge_adapter; "
        f"merge_adapter({str(plain)!r}, {str(tmp_path / 'adapter')!r}, {str(tmp_path / 'out')!r})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ConfigError: merging an adapter needs peft" in done.stderr
    assert "pip install peft" in done.stderr


def test_a_dense_result_whose_names_plain_transformers_does_not_know_is_refused(tmp_path: Path) -> None:
    folder = PEERS / "phi3-4-32"  # its tool cut layers in two
    adapter = tmp_path / "adapter"
    write_lora(adapter, load(folder), ["model.layers.0.self_attn.o_proj"])
    with pytest.raises(ConfigError, match="called otherwise than transformers calls dense ones"):
        merge_adapter(folder, adapter, tmp_path / "out", to="bf16")
    assert not (tmp_path / "out").exists()
