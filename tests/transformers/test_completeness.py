"""No tensor of the original is lost on the way into its checkpoint, and none is copied twice."""

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
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from gptq_backend import GPTQError, QuantLinear
from gptq_transformers import from_quantized, quantize
from tests.transformers.kinds import CONFIG, HEADS, KINDS, edit, everything, qwen3, samples, save


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
