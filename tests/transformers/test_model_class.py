"""A folder is loaded, quantized and written as the class that its config.json names, or refused in one sentence."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

import transformers
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    BartConfig,
    BertConfig,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    PretrainedConfig,
    PreTrainedModel,
    Qwen3Config,
    T5Config,
    Wav2Vec2Config,
)

from gptq_backend import CalibrationError, ConfigError, GPTQError, QuantizeConfig, QuantLinear
from gptq_cli.evaluate import load_model
from gptq_transformers import from_quantized, quantize
from tests.cli.command import error, run
from tests.toy import listener

CONFIG = QuantizeConfig(bits=8, group_size=32, quality="fast")
SIZES: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
HEADS: dict[str, Any] = {**SIZES, "num_key_value_heads": 2, "head_dim": 16, "pad_token_id": 0}
T5 = {"vocab_size": 128, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 2, "num_heads": 4}
SIDES = {"layers": 2, "attention_heads": 4, "ffn_dim": 96}
BART = {f"{side}_{key}": value for side in ("encoder", "decoder") for key, value in SIDES.items()}
VISION = {"hidden_size": 96, "intermediate_size": 384, "num_attention_heads": 4, "image_size": 28, "patch_size": 14}
SOUND = {"conv_dim": (32, 32), "conv_stride": (5, 2), "conv_kernel": (10, 3), "num_feat_extract_layers": 2}


def qwen3() -> PretrainedConfig:
    return Qwen3Config(**HEADS, num_labels=3)


def bert() -> PretrainedConfig:
    return BertConfig(**SIZES, num_labels=3)


def bart() -> PretrainedConfig:
    return BartConfig(vocab_size=128, d_model=64, max_position_embeddings=64, **BART)


def llava() -> PretrainedConfig:
    vision = CLIPVisionConfig(num_hidden_layers=3, **VISION)  # heavier than the language model
    text = LlamaConfig(**HEADS)
    return LlavaConfig(vision_config=vision, text_config=text, image_token_index=127, vision_feature_layer=-1)


def sound() -> PretrainedConfig:
    return Wav2Vec2Config(**{**SIZES, "vocab_size": 32}, **SOUND)


KINDS = {
    "Qwen3ForCausalLM": (qwen3, 14),
    "Qwen3ForSequenceClassification": (qwen3, 14),
    "Qwen3ForTokenClassification": (qwen3, 14),
    "Qwen3ForQuestionAnswering": (qwen3, 14),
    "Qwen3Model": (qwen3, 14),
    "BertForMaskedLM": (bert, 12),
    "BertForSequenceClassification": (bert, 12),
    "BertForPreTraining": (bert, 12),
    "BertLMHeadModel": (bert, 12),
    "BertModel": (bert, 12),
    "LlavaForConditionalGeneration": (llava, 14),
}


def save(folder: Path, name: str, config: PretrainedConfig) -> Path:
    torch.manual_seed(0)
    getattr(transformers, name)(config).save_pretrained(folder)
    return folder


def edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def samples() -> list[torch.Tensor]:
    return list(torch.randint(3, 120, (8, 24), generator=torch.Generator().manual_seed(1)))


def everything(output: Any) -> torch.Tensor:
    """All floats that a model returns for a batch, but for what only serves to go on."""
    parts = [value for value in output.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]
    return torch.cat([part.flatten() for part in parts])


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
def test_an_encoder_decoder_is_not_written_as_something_else(name: str, config: Any, tmp_path: Path) -> None:
    source = save(tmp_path / "source", name, config())
    for architectures in ([name], None):
        edit(source, architectures=architectures)
        with pytest.raises(GPTQError, match=r"encoder-decoder|Unrecognized configuration"):
            quantize(source, CONFIG, samples(), output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("name", ["T5EncoderModel", "UMT5EncoderModel"])
def test_an_encoder_whose_config_says_encoder_decoder_is_quantized(name: str, tmp_path: Path) -> None:
    kind = getattr(transformers, name)
    source = save(tmp_path / "source", name, kind.config_class(**T5))
    edit(source, is_encoder_decoder=True)
    quantize(source, CONFIG, samples(), output=tmp_path / "out")
    loaded = kind.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) >= 12


@pytest.mark.parametrize("loaded", [True, False])
def test_a_model_of_other_inputs_can_only_be_rounded(loaded: bool, tmp_path: Path) -> None:
    source = save(tmp_path / "source", "Wav2Vec2ForCTC", sound())
    model = transformers.Wav2Vec2ForCTC.from_pretrained(source) if loaded else source
    with pytest.raises(CalibrationError, match=r"Wav2Vec2ForCTC cannot be called with token ids alone .*None"):
        quantize(model, CONFIG, samples(), output=tmp_path / "out")
    quantize(source, CONFIG, None, output=tmp_path / "out")
    assert type(from_quantized(tmp_path / "out")).__name__ == "Wav2Vec2ForCTC"


def test_an_encoder_decoder_in_memory_that_wants_decoder_inputs_says_so() -> None:
    model = transformers.T5ForConditionalGeneration(T5Config(**T5))
    with pytest.raises(CalibrationError, match=r"T5ForConditionalGeneration cannot be called with token ids alone"):
        quantize(model, CONFIG, samples())


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


@pytest.mark.parametrize("name", ["Qwen3ForSequenceClassification", "BertForMaskedLM", "Qwen3Model"])
def test_figures_of_language_models_are_not_measured_of_others(name: str, tmp_path: Path) -> None:
    source = save(tmp_path / "source", name, KINDS[name][0]())
    with pytest.raises(GPTQError, match=f"is a {name}, which does not predict the next token"):
        load_model(source)


def test_a_classifier_is_quantized_by_the_command_without_a_comparison(original: Path, tmp_path: Path) -> None:
    from tests.cli.command import SMALL, TEXT

    config = LlamaConfig(**{**HEADS, "vocab_size": 259, "num_labels": 3})
    source = save(tmp_path / "source", "LlamaForSequenceClassification", config)
    for file in original.glob("tokenizer*"):
        (source / file.name).write_bytes(file.read_bytes())
    result = run("quantize", source, tmp_path / "out", *SMALL, "--calibration", TEXT)
    assert result.exit_code == 0, result.output
    assert "LlamaForSequenceClassification, which does not predict the next token" in " ".join(result.stderr.split())
    assert "KL divergence from" not in result.stdout
    assert "score.weight" in load_file(tmp_path / "out" / "model.safetensors")
    message = error(run("eval", tmp_path / "out", "--text", TEXT))
    assert "does not predict the next token" in message


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


def test_tensors_that_the_class_does_not_use_are_copied(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    source = save(tmp_path / "source", "Qwen3ForCausalLM", qwen3())
    tensors = load_file(source / "model.safetensors")
    extra = {"mtp.layers.0.proj.weight": torch.randn(4, 4), "model.layers.0.rotary_emb.inv_freq": torch.randn(8)}
    save_file({**tensors, **extra}, source / "model.safetensors", {"format": "pt"})
    quantize(source, CONFIG, None, output=tmp_path / "out")
    assert "does not use 2 tensors" in caplog.text
    written: dict[str, torch.Tensor] = {}
    for file in (tmp_path / "out").glob("*.safetensors"):
        written |= load_file(file)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    assert index.keys() == written.keys()
    assert all(torch.equal(written[key], tensor) for key, tensor in extra.items())
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert sum(isinstance(module, QuantLinear) for module in loaded.modules()) == 14


def test_a_tensor_that_would_be_lost_stops_the_run_before_the_output_appears(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = save(tmp_path / "source", "Qwen3ForCausalLM", qwen3())
    saved = PreTrainedModel.state_dict

    def forgetful(self: Any, *args: Any, **kwargs: Any) -> Any:  # as a class whose own state_dict leaves something out
        state = saved(self, *args, **kwargs)
        if sum("qweight" in key for key in state):
            state.pop("model.norm.weight")
        return state

    monkeypatch.setattr(transformers.Qwen3ForCausalLM, "state_dict", forgetful)
    with pytest.raises(GPTQError, match=r"1 tensors of .*source would be lost \(model.norm.weight\)"):
        quantize(source, CONFIG, None, output=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def bert_of_old(key: str) -> str:
    """As TensorFlow called them."""
    return key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta")


def llava_of_old(key: str) -> str:
    key = re.sub(r"^model\.language_model\.", "language_model.model.", key)
    return re.sub(r"^model\.", "", re.sub(r"^lm_head", "language_model.lm_head", key))


def llava_of_new(key: str) -> str:
    key = re.sub(r"^language_model\.model\.", "model.language_model.", key)
    key = re.sub(r"^language_model\.lm_head", "lm_head", key)
    return re.sub(r"^(vision_tower|multi_modal)", r"model.\1", key)


@pytest.mark.parametrize(
    ("name", "rename"),
    [
        ("BertForMaskedLM", bert_of_old),
        ("BertForSequenceClassification", bert_of_old),
        ("LlavaForConditionalGeneration", llava_of_old),
        ("LlavaForConditionalGeneration", llava_of_new),
    ],
)
def test_tensors_under_other_names_are_neither_lost_nor_copied_twice(
    name: str, rename: Callable[[str], str], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source = save(tmp_path / "source", name, KINDS[name][0]())
    tensors = {rename(key): tensor.clone() for key, tensor in load_file(source / "model.safetensors").items()}
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize(source, CONFIG, samples(), output=tmp_path / "out")
    assert "does not use" not in caplog.text
    ids = {"input_ids": samples()[0][None]}
    with torch.no_grad():
        wanted = everything(getattr(transformers, name).from_pretrained(source)(**ids))
        found = everything(from_quantized(tmp_path / "out")(**ids))
    assert (found - wanted).norm() < 0.1 * wanted.norm()


def test_a_head_tied_in_memory_and_twice_in_the_file_is_not_lost(tmp_path: Path) -> None:
    config = Qwen3Config(**HEADS, tie_word_embeddings=True)
    source = save(tmp_path / "source", "Qwen3ForCausalLM", config)
    tensors = load_file(source / "model.safetensors")
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    save_file(tensors, source / "model.safetensors", {"format": "pt"})
    quantize(source, CONFIG, None, output=tmp_path / "out")
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_a_base_checkpoint_without_prefix_is_quantized_as_the_language_model_it_names(tmp_path: Path) -> None:
    source = save(tmp_path / "source", "Qwen3Model", Qwen3Config(**HEADS, tie_word_embeddings=True))
    edit(source, architectures=["Qwen3ForCausalLM"])
    model, _ = quantize(source, CONFIG, None, output=tmp_path / "out")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = samples()[0][None]
    with torch.no_grad():
        torch.testing.assert_close(again(ids).logits, model.eval()(ids).logits, atol=1e-5, rtol=1e-4)
