"""``from_pretrained`` of an unquantized model with ``quantization_config=GPTQConfig(dataset=...)``."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPTQConfig, PreTrainedTokenizerFast

from gptq_backend import CalibrationError, ConfigError, QuantLinear
from tests.transformers.checkpoints import PEERS, distance, load, logits, tiny

TEXTS = ["The quick brown fox jumps over the lazy dog, again and again. " * 4, "Pack my box with five dozen jugs. " * 6]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("plain") / "llama"
    tiny().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder whose tokenizer_config.json this version of transformers understands."""
    folder = tmp_path_factory.mktemp("tokenizer")
    file = PEERS / "llama-4-32-sym" / "tokenizer.json"
    PreTrainedTokenizerFast(tokenizer_file=str(file)).save_pretrained(folder)
    return str(folder)


def quantized(folder: Path, config: Any, **kwargs: Any) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, quantization_config=config, dtype=torch.float32, **kwargs)


@pytest.mark.parametrize("as_path", [True, False])
def test_the_result_is_saved_and_loads_the_same(as_path: bool, plain: Path, tmp_path: Path, tokenizer: str) -> None:
    config = GPTQConfig(
        bits=4,
        group_size=32,
        dataset=TEXTS,
        tokenizer=tokenizer if as_path else AutoTokenizer.from_pretrained(tokenizer),
    )
    model = quantized(plain, config)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    assert distance(logits(model), logits(load(plain))) < 0.3
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (saved["bits"], saved["group_size"], saved["quant_method"]) == (4, 32, "gptq")
    assert not {"tokenizer", "dataset", "backend"} & saved.keys()
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_options_take_effect(plain: Path, tokenizer: str) -> None:
    config = GPTQConfig(
        bits=3,
        group_size=-1,
        desc_act=True,
        sym=False,
        dataset=TEXTS,
        tokenizer=tokenizer,
        modules_in_block_to_quantize=[["self_attn.q_proj"], ["mlp.up_proj"]],
        model_seqlen=32,
    )
    layers = {name: m for name, m in quantized(plain, config).named_modules() if isinstance(m, QuantLinear)}
    assert {name.rpartition(".")[2] for name in layers} == {"q_proj", "up_proj"}
    assert {(layer.spec.bits, layer.spec.groups, layer.spec.sym) for layer in layers.values()} == {(3, 1, False)}


@pytest.mark.parametrize("ours", [True, False])
def test_codes_of_five_bits_are_saved_under_the_format_that_has_them(
    ours: bool, plain: Path, tokenizer: str, tmp_path: Path
) -> None:
    from gptq_transformers import GPTQConfig as Ours

    kind: Any = Ours if ours else GPTQConfig
    model = quantized(plain, kind(bits=5, group_size=32, dataset=TEXTS, tokenizer=tokenizer))
    model.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert (saved["bits"], saved["checkpoint_format"], saved.get("format", "gptq_p")) == (5, "gptq_p", "gptq_p")
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_keys_that_only_we_know_take_effect(plain: Path, tokenizer: str) -> None:
    from gptq_transformers import GPTQConfig as Ours

    config = Ours(
        bits=4, group_size=32, dataset=TEXTS, tokenizer=tokenizer, dynamic={r"-:.*mlp.*": {}}, static_groups=True
    )
    model = quantized(plain, config)
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 8
    assert model.config.quantization_config.dynamic == {r"-:.*mlp.*": {}}


def test_token_ids_are_taken(plain: Path) -> None:
    ids = [list(range(3, 40)), list(range(50, 87))]
    assert isinstance(
        quantized(plain, GPTQConfig(bits=4, group_size=32, dataset=ids)).model.layers[0].mlp.up_proj, QuantLinear
    )


def test_no_data_is_refused(plain: Path) -> None:
    with pytest.raises(ConfigError, match=r"no calibration data.*dataset=\[texts\]"):
        quantized(plain, GPTQConfig(bits=4))


def test_an_empty_data_set_is_refused(plain: Path) -> None:
    with pytest.raises(CalibrationError, match="empty"):
        quantized(plain, GPTQConfig(bits=4, group_size=32, dataset=[]))


def test_a_missing_tokenizer_is_refused_with_what_to_do(plain: Path) -> None:
    with pytest.raises(CalibrationError, match="no tokenizer could be loaded from .* pass tokenizer= or"):
        quantized(plain, GPTQConfig(bits=4, group_size=32, dataset=TEXTS))


@pytest.mark.parametrize("name", ["wikitext2", "c4", "c4-new"])
def test_an_unreachable_data_set_is_refused_with_an_alternative(name: str, plain: Path, tokenizer: str) -> None:
    pytest.importorskip("datasets", exc_type=ImportError)
    with pytest.raises(CalibrationError, match=rf"dataset='{name}' cannot be fetched \(.*pass dataset=\[texts\]"):
        quantized(plain, GPTQConfig(bits=4, group_size=32, dataset=name, tokenizer=tokenizer))


def test_without_the_package_datasets_the_error_says_what_to_install(
    plain: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(CalibrationError, match=r"pip install datasets.*pass dataset=\[texts\]"):
        quantized(plain, GPTQConfig(bits=4, group_size=32, dataset="c4", tokenizer=tokenizer))


@pytest.mark.parametrize("name", ["wikitext2", "c4"])
def test_a_named_data_set_is_calibrated_on(
    name: str, plain: Path, monkeypatch: pytest.MonkeyPatch, tokenizer: str
) -> None:
    datasets = pytest.importorskip("datasets", exc_type=ImportError)
    rows = datasets.Dataset.from_dict({"text": TEXTS * 4})
    monkeypatch.setattr(datasets, "load_dataset", lambda *args, **kwargs: rows)
    model = quantized(plain, GPTQConfig(bits=4, group_size=32, dataset=name, tokenizer=tokenizer))
    assert isinstance(model.model.layers[1].mlp.down_proj, QuantLinear)


def test_offloaded_weights_are_refused(plain: Path, tmp_path: Path, tokenizer: str) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    config = GPTQConfig(bits=4, group_size=32, dataset=TEXTS, tokenizer=tokenizer)
    with pytest.raises(ConfigError, match="device_map"):
        quantized(plain, config, device_map=device_map, offload_folder=tmp_path)


@pytest.mark.parametrize("model_type", ["gpt2", "mixtral"])
def test_conv1d_layers_and_fused_experts_are_quantized(model_type: str, tmp_path: Path, tokenizer: str) -> None:
    tiny(model_type).save_pretrained(tmp_path / "plain")
    config = GPTQConfig(bits=4, group_size=32, dataset=TEXTS, tokenizer=tokenizer)
    model = quantized(tmp_path / "plain", config)
    assert (
        sum(isinstance(m, QuantLinear) for m in model.modules()) == {"gpt2": 8, "mixtral": 2 * (4 + 4 * 3)}[model_type]
    )
    model.save_pretrained(tmp_path / "saved")
    assert distance(logits(load(tmp_path / "saved")), logits(model)) < 1e-6
