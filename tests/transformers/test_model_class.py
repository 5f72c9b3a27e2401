"""A folder is loaded, quantized and written as the class that its config.json names, or refused in one sentence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from safetensors.torch import load_file
from transformers import T5Config

from gptq_backend import CalibrationError, ConfigError, GPTQError, QuantizeConfig, QuantLinear
from gptq_cli.models import load_model
from gptq_transformers import from_quantized, quantize
from tests.toy import listener
from tests.transformers.kinds import CONFIG, KINDS, T5, bart, edit, everything, qwen3, samples, save, sound


@pytest.mark.parametrize("calibrated", [True, False])
@pytest.mark.parametrize("name", KINDS)
def test_a_folder_keeps_its_class_and_every_tensor(name: str, calibrated: bool, tmp_path: Path) -> None:
    make, layers = KINDS[name]
    source = save(tmp_path / "source", name, make())
    model, report = quantize(source, CONFIG, samples() if calibrated else None, output=tmp_path / "out")
    assert len(report.layers) == layers
    before, after = (load_file(tmp_path / folder / "model.safetensors") for folder in ("source", "out"))
    for key, tensor in before.items():
        if f"{key.removesuffix('.weight')}.qweight" not in after:
            assert torch.equal(after[key], tensor), key
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == [name]
    loaded = from_quantized(tmp_path / "out")
    assert type(loaded).__name__ == type(model).__name__ == name
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) == layers
    ids = {"input_ids": samples()[0][None]}
    original = getattr(transformers, name).from_pretrained(source)
    with torch.no_grad():
        wanted, found = everything(original(**ids)), everything(loaded(**ids))
        torch.testing.assert_close(found, everything(model.eval()(**ids)), atol=1e-5, rtol=1e-4)
    assert (found - wanted).norm() < 0.1 * wanted.norm()


@pytest.mark.parametrize(("name", "config"), [("T5ForConditionalGeneration", lambda: T5Config(**T5)),
                                              ("BartForConditionalGeneration", bart)])  # fmt: skip
@pytest.mark.parametrize("named", [True, False])
def test_both_stacks_of_an_encoder_decoder_are_quantized(name: str, config: Any, named: bool, tmp_path: Path) -> None:
    source = save(tmp_path / "source", name, config())
    edit(source, architectures=[name] if named else None)
    model, report = quantize(source, CONFIG, samples(), output=tmp_path / "out")
    assert type(model).__name__ == name
    assert len(report.layers) == 2 * (4 + 2) + 2 * (8 + 2)
    assert {layer.method for layer in report.layers} == {"cholesky"}


@pytest.mark.parametrize("name", ["T5EncoderModel", "UMT5EncoderModel"])
def test_an_encoder_whose_config_says_encoder_decoder_is_quantized(name: str, tmp_path: Path) -> None:
    kind = getattr(transformers, name)
    source = save(tmp_path / "source", name, kind.config_class(**T5))
    edit(source, is_encoder_decoder=True)
    quantize(source, CONFIG, samples(), output=tmp_path / "out")
    loaded = kind.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) >= 12


@pytest.mark.parametrize("loaded", [True, False])
def test_a_model_that_hears_is_calibrated_on_made_sounds(loaded: bool, tmp_path: Path) -> None:
    source = save(tmp_path / "source", "Wav2Vec2ForCTC", sound())
    model = transformers.Wav2Vec2ForCTC.from_pretrained(source) if loaded else source
    _, report = quantize(model, CONFIG, samples()[:2], output=tmp_path / "out")
    assert {layer.method for layer in report.layers} == {"cholesky"}
    assert type(from_quantized(tmp_path / "out")).__name__ == "Wav2Vec2ForCTC"


def test_inputs_that_a_model_does_not_take_are_refused() -> None:
    model = transformers.T5ForConditionalGeneration(T5Config(**T5))
    sample = {"input_ids": samples()[0], "pixels": torch.zeros(1)}
    with pytest.raises(CalibrationError, match=r"'pixels', which T5ForConditionalGeneration does not take"):
        quantize(model, CONFIG, [sample])


def test_without_architectures_a_folder_is_a_causal_language_model(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "Qwen3ForCausalLM", qwen3())
    edit(source, architectures=None)
    model, _ = quantize(source, CONFIG, None)
    assert type(model).__name__ == "Qwen3ForCausalLM"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"architectures": ["NobodysForCausalLM"]}, r"NobodysForCausalLM, which transformers .* pass it instead"),
        ({"architectures": ["Trainer"]}, "the class Trainer, which transformers"),
        ({"architectures": ["BertForMaskedLM"]}, r"BertForMaskedLM, which does not fit its model_type 'qwen3'"),
        ({"architectures": [7]}, r"architectures=\[7\]; expected a list with a class name"),
        ({"architectures": ["OwnModel"], "auto_map": {"AutoModel": "own.OwnModel"}}, "trust_remote_code=True"),
        (
            {"architectures": ["OwnForCausalLM"], "model_type": "own", "auto_map": {"AutoConfig": "own.OwnConfig"}},
            r"needs code that comes with it \(OwnForCausalLM\).* trust_remote_code=True",
        ),
    ],
)
def test_a_class_that_is_not_to_be_had_is_refused(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", "Qwen3ForCausalLM", qwen3())
    edit(source, **change)
    with pytest.raises(GPTQError, match=message):
        quantize(source, CONFIG, None, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": ["qwen3"]},
        {"model_type": None},
        {"model_type": "nobody", "auto_map": ["AutoConfig"]},
        {"hidden_size": "64"},
        {"hidden_size": None},
        {"num_hidden_layers": [2]},
        {"layer_types": 3},
        {"rope_parameters": [1]},
        {"architectures": "Qwen3ForCausalLM"},
        {"architectures": {"0": "Qwen3ForCausalLM"}},
        {"dtype": "float17"},
    ],
)
def test_a_damaged_config_ends_in_one_sentence(change: dict[str, Any], tmp_path: Path) -> None:
    source = save(tmp_path / "source", "Qwen3ForCausalLM", qwen3())
    edit(source, **change)
    with pytest.raises(GPTQError) as raised:
        quantize(source, CONFIG, None)
        pytest.skip("this version understands it")
    assert "\n" not in str(raised.value)
    assert str(source) in str(raised.value)


def test_weights_that_the_files_lack_are_not_made_up(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "Qwen3ForSequenceClassification", qwen3())
    edit(source, architectures=["Qwen3ForCausalLM"])
    with pytest.raises(GPTQError, match=r"its files lack 1 weights that Qwen3ForCausalLM needs \(lm_head.weight\)"):
        quantize(source, CONFIG, None, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


OWN = """
from transformers import Qwen3Config, Qwen3ForCausalLM

class OwnConfig(Qwen3Config):
    model_type = "own"

class OwnForCausalLM(Qwen3ForCausalLM):
    config_class = OwnConfig
"""


def test_code_that_comes_with_a_model_runs_only_with_leave(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("it asks"))
    source = save(tmp_path / "source", "Qwen3ForCausalLM", qwen3())
    (source / "own.py").write_text(OWN)
    entries = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    edit(source, architectures=["OwnForCausalLM"], model_type="own", auto_map=entries)
    with pytest.raises(ConfigError, match="trust_remote_code=True"):
        quantize(source, CONFIG, None, output=tmp_path / "out")
    quantize(source, CONFIG, samples(), output=tmp_path / "out", trust_remote_code=True)
    assert (tmp_path / "out" / "own.py").is_file()
    with pytest.raises(ConfigError, match="trust_remote_code=True"):
        from_quantized(tmp_path / "out")
    loaded = from_quantized(tmp_path / "out", trust_remote_code=True)
    assert type(loaded).__name__ == "OwnForCausalLM"
    assert type(load_model(tmp_path / "out", trust_remote_code=True)).__name__ == "OwnForCausalLM"


def test_old_spellings_of_a_language_model_load_as_one(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "Qwen3ForCausalLM", qwen3())
    quantize(source, CONFIG, None, output=tmp_path / "out")
    edit(tmp_path / "out", architectures=["QWenForCausalLM"])
    assert type(from_quantized(tmp_path / "out")).__name__ == "Qwen3ForCausalLM"


def test_arguments_reach_the_class_of_a_checkpoint(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "Qwen3ForSequenceClassification", qwen3())
    quantize(source, CONFIG, None, output=tmp_path / "out")
    settings = json.loads((tmp_path / "out" / "config.json").read_text()).pop("quantization_config")
    edit(tmp_path / "out", quantization_config=None)
    (tmp_path / "out" / "quantize_config.json").write_text(json.dumps(settings))
    loaded = from_quantized(tmp_path / "out", dtype=torch.bfloat16, trust_remote_code=False)
    assert isinstance(loaded, transformers.Qwen3ForSequenceClassification)
    assert loaded.score.weight.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["Qwen3Model", "Qwen3ForSequenceClassification"])
def test_a_distillation_of_a_model_without_predictions_is_refused_before_the_work(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", name, qwen3())
    best = QuantizeConfig(bits=4, group_size=32, quality="best")
    with pytest.raises(ConfigError, match=f"{name} predicts none; set distill_epochs=0"):
        quantize(
            source, best, samples(), batch_size=2, events=listener(layer_done=lambda *_: pytest.fail("it started"))
        )
    settings = QuantizeConfig(bits=4, group_size=32, quality="best", distill_epochs=0)
    _, report = quantize(source, settings, samples(), batch_size=2)
    assert len(report.blocks) == 2
