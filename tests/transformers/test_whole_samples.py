"""Calibration samples get all that a model is called with: a decoder's text, pictures, sound."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")
import transformers
from transformers import PreTrainedTokenizerFast

import gptq_transformers
from gptq_backend import CalibrationError, QuantizeConfig, QuantLinear
from gptq_transformers.made_media import picture, sound
from gptq_transformers.whole_samples import whole_samples
from tests.cli.command import CHECKPOINTS
from tests.transformers.kinds import BART, HEADS, SIZES, T5, bart, samples

CONFIG = QuantizeConfig(bits=8, group_size=32, quality="fast")
WHISPER: dict[str, Any] = {"d_model": 64, "num_mel_bins": 80, "max_source_positions": 1500, "pad_token_id": 0}


def tokenizer() -> Any:
    file = str(CHECKPOINTS / "llama-4-32-sym" / "tokenizer.json")
    return PreTrainedTokenizerFast(tokenizer_file=file, bos_token="<s>", pad_token="<pad>")


def test_pictures_and_sounds_are_the_same_every_time_and_differ_from_one_another() -> None:
    pictures = [np.asarray(picture(seed)) for seed in (0, 0, 1)]
    assert (pictures[0] == pictures[1]).all()
    assert (pictures[0] != pictures[2]).mean() > 0.9
    assert 20 < pictures[0].std() < 120
    waves = [sound(seed) for seed in (0, 0, 1)]
    assert (waves[0] == waves[1]).all()
    assert (waves[0] != waves[2]).mean() > 0.9
    assert 0.01 < waves[0].std() < 0.3
    assert abs(waves[0]).max() <= 0.3


def llava(folder: Path) -> Any:
    """A model with its processor, whose image token is one of the tokenizer's."""
    processor_of = tokenizer()
    processor_of.add_tokens(["<image>"], special_tokens=True)
    mark = processor_of.convert_tokens_to_ids("<image>")
    text = transformers.LlamaConfig(**{**HEADS, "vocab_size": 320, "max_position_embeddings": 256})
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    vision = transformers.CLIPVisionConfig(**sizes, image_size=28, patch_size=14)
    config = transformers.LlavaConfig(
        text_config=text, vision_config=vision, image_token_index=mark, image_token_id=mark, vision_feature_layer=-1,
        vision_feature_select_strategy="default",
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(config)
    model.save_pretrained(folder)
    size = {"height": 28, "width": 28}
    images = transformers.CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=size)
    transformers.LlavaProcessor(
        image_processor=images, tokenizer=processor_of, patch_size=14, image_token="<image>",
        vision_feature_select_strategy="default", num_additional_image_tokens=1,
    ).save_pretrained(folder)  # fmt: skip
    return model


def test_a_model_that_sees_is_calibrated_on_pictures_too_and_its_processor_is_kept(tmp_path: Path) -> None:
    model = llava(tmp_path / "model")
    added = whole_samples(samples(), model, tmp_path / "model")[len(samples()) :]
    assert len(added) == 1
    assert {"input_ids", "pixel_values"} <= added[0].keys()
    assert int((added[0]["input_ids"] == model.config.image_token_id).sum()) == 4
    _, report = gptq_transformers.quantize(tmp_path / "model", CONFIG, samples(), output=tmp_path / "out")
    assert {layer.tokens for layer in report.layers} == {8 * 24 + added[0]["input_ids"].shape[1]}
    assert type(transformers.AutoProcessor.from_pretrained(tmp_path / "out")).__name__ == "LlavaProcessor"


def test_pictures_are_added_to_text_in_any_form_but_not_to_those_of_the_user(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, path = llava(tmp_path / "model"), tmp_path / "model"
    ids = samples()[0]
    for text in ({"text": "abc"}, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}):
        _, added = whole_samples([text], model, path)
        assert {"input_ids", "pixel_values"} <= added.keys()
    assert len(whole_samples([{"text": "<image>a", "images": picture(7)}, ids], model, path)) == 2
    assert not caplog.records


def test_the_tower_that_sees_can_be_named(tmp_path: Path) -> None:
    model = llava(tmp_path / "model")
    lists = [name for name, module in model.named_modules() if isinstance(module, torch.nn.ModuleList)]
    made, report = gptq_transformers.quantize(tmp_path / "model", CONFIG, samples(), block_name=lists)
    assert sum(isinstance(module, QuantLinear) for module in made.modules()) == 2 * 7 + 2 * 6
    assert {layer.method for layer in report.layers if "vision" in layer.name} == {"cholesky"}


def test_samples_may_be_what_the_processor_takes(tmp_path: Path) -> None:
    llava(tmp_path / "model")
    data = [{"text": "<image>a", "images": picture(7)}, {"text": "only text"}]
    _, report = gptq_transformers.quantize(tmp_path / "model", CONFIG, data)
    assert {layer.method for layer in report.layers} == {"cholesky"}
    with pytest.raises(CalibrationError, match=r"sample 0 cannot be prepared by LlavaProcessor"):
        gptq_transformers.quantize(tmp_path / "model", CONFIG, [{"text": "a", "images": 3}])


def test_a_decoder_reads_the_same_text_behind_its_start_token() -> None:
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**T5, decoder_start_token_id=5))
    ids = torch.tensor([[8, 9, 10], [11, 12, 0], [0, 0, 0]])
    found = whole_samples([{"input_ids": ids, "attention_mask": (ids != 0).int()}], model, "")
    assert [sample["input_ids"].tolist() for sample in found] == [[8, 9, 10], [11, 12]]
    assert [sample["decoder_input_ids"].tolist() for sample in found] == [[5, 8, 9], [5, 11]]
    given = {"input_ids": ids, "decoder_input_ids": ids}
    assert whole_samples([given], model, "") == [given]


def test_text_for_the_processor_alone_is_completed_too(tmp_path: Path) -> None:
    model = transformers.T5ForConditionalGeneration(transformers.T5Config(**{**T5, "vocab_size": 320}))
    (sample,) = whole_samples([{"text": "abc"}], model, tmp_path, tokenizer())
    assert {"input_ids", "decoder_input_ids"} <= sample.keys()


@pytest.mark.parametrize("ids", ["abc", [[1, 2], [3]]])
def test_what_is_no_token_ids_is_refused_in_a_sentence(ids: Any) -> None:
    model = transformers.BartForConditionalGeneration(bart())
    with pytest.raises(CalibrationError, match="calibration sample 0 is a dict; expected token ids"):
        gptq_transformers.quantize(model, CONFIG, [{"input_ids": ids}])


def test_a_decoder_that_has_nothing_to_read_is_told_after_the_encoder_has_run() -> None:
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(vocab_size=128, **WHISPER, **BART))
    with pytest.raises(CalibrationError, match="cannot be called with input_features alone"):
        gptq_transformers.quantize(model, CONFIG, [{"input_features": torch.randn(1, 80, 3000)}])


@pytest.mark.parametrize("lengths", [[(9, 4), (5, 9), (3, 6)], [(9, 4), (5, 7), (3, 6)]])
def test_padding_of_labels_changes_nothing(lengths: list[tuple[int, int]]) -> None:
    """As a data collator pads them, also to the length of what the encoder reads."""
    pairs = [(samples()[i][:n], samples()[-i - 1][:m]) for i, (n, m) in enumerate(lengths)]
    ids, labels = (
        torch.nn.utils.rnn.pad_sequence([pair[i] for pair in pairs], True, value) for i, value in enumerate((0, -100))
    )
    padded = {"input_ids": ids, "attention_mask": (ids != 0).long(), "labels": labels}
    assert_same([{"input_ids": text, "labels": label} for text, label in pairs], [padded])


def test_padding_of_both_stacks_changes_nothing() -> None:
    """Lengths that are equal in both stacks, and masks that are not."""
    ids, out = samples()[0][:9], samples()[1][:6]
    zeros = torch.zeros(3, dtype=torch.long)
    padded = {
        "input_ids": ids, "decoder_input_ids": torch.cat([out, zeros]),
        "attention_mask": torch.ones(9), "decoder_attention_mask": torch.cat([torch.ones(6), zeros]),
    }  # fmt: skip
    assert_same([{"input_ids": ids, "decoder_input_ids": out}], [padded])


def assert_same(*calibrations: list[Any]) -> None:
    """Both quantize a model alike."""
    found = []
    for data in calibrations:
        torch.manual_seed(0)
        model = transformers.BartForConditionalGeneration(bart()).double()
        _, report = gptq_transformers.quantize(model, CONFIG, data)
        found.append(({layer.name: layer.tokens for layer in report.layers}, model))
    assert found[0][0] == found[1][0]
    for name, module in found[0][1].named_modules():
        if isinstance(module, QuantLinear):
            other = found[1][1].get_submodule(name).quantized_weight()
            assert torch.equal(module.quantized_weight().codes, other.codes), name


@pytest.mark.parametrize("kind", ["T5", "Bart"])
def test_an_encoder_decoder_can_be_trained(kind: str, tmp_path: Path) -> None:
    """Its blocks and then the whole; T5 reads the weight of a layer to learn its dtype."""
    config = bart() if kind == "Bart" else transformers.T5Config(**T5, decoder_start_token_id=0)
    torch.manual_seed(0)
    getattr(transformers, f"{kind}ForConditionalGeneration")(config).save_pretrained(tmp_path)
    settings = QuantizeConfig(group_size=32, quality="fast", block_epochs=1, distill_epochs=1)
    data = [{"input_ids": ids, "labels": ids.flip(0)} for ids in samples()]
    _, report = gptq_transformers.quantize(tmp_path, settings, data, batch_size=2)
    assert len(report.blocks) == 4
    assert report.distillation is not None


@pytest.mark.parametrize("processor", [True, False])
def test_a_model_that_hears_gets_sound(processor: bool, tmp_path: Path) -> None:
    model = transformers.WhisperForConditionalGeneration(transformers.WhisperConfig(vocab_size=128, **WHISPER, **BART))
    if processor:
        transformers.WhisperFeatureExtractor().save_pretrained(tmp_path)
    (sample,) = whole_samples(samples()[:1], model, tmp_path)
    assert sample["input_features"].shape == (1, 80, 3000)
    assert 0.1 < sample["input_features"].std() < 2
    assert sample["decoder_input_ids"].shape == (1, 24)


def test_a_picture_without_a_processor_is_as_large_as_the_model_says() -> None:
    encoder = transformers.ViTConfig(**{**SIZES, "image_size": 32, "patch_size": 16})
    decoder = transformers.BertConfig(**SIZES, is_decoder=True, add_cross_attention=True)
    config = transformers.VisionEncoderDecoderConfig.from_encoder_decoder_configs(encoder, decoder)
    config.decoder_start_token_id = 1
    model = transformers.VisionEncoderDecoderModel(config)
    (sample,) = whole_samples(samples()[:1], model, "")
    assert sample["pixel_values"].shape == (1, 3, 32, 32)
    _, report = gptq_transformers.quantize(model, CONFIG, samples()[:2])
    assert len(report.layers) == 2 * 6 + 2 * 10
