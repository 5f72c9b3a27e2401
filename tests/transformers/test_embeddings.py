"""Quantized embeddings: written, read, tied to the head in one tensor, changed, and trained on top of."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, Gemma3ForCausalLM, Gemma3TextConfig, LlamaForCausalLM

from gptq_backend import ConfigError, QuantEmbedding, QuantizeConfig, QuantLinear, TiedHead
from gptq_backend.format import checkpoint_files, read_manifest
from gptq_transformers import GPTQConfig, quantize
from gptq_transformers.converting import convert
from tests.transformers.checkpoints import VOCABULARY, distance, load, logits, tiny

TOKENS = 4 * 32


def settings(bits: int | None, **more: Any) -> QuantizeConfig:
    return QuantizeConfig(**{"bits": 4, "group_size": 32, "embed_bits": bits, "quality": "fast", **more})


def calibration(vocabulary: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(3, vocabulary, (1, 32), generator=generator) for _ in range(4)]


@pytest.fixture(scope="module", params=["tied", "own head"])
def source(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("source")
    tiny(tie_word_embeddings=request.param == "tied").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=[8, 4], ids="{}-bit".format)
def folder(request: pytest.FixtureRequest, source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "model"
    vocabulary = LlamaForCausalLM.from_pretrained(source).config.vocab_size
    quantize(source, settings(request.param), calibration(vocabulary), output=out)
    return out


def stored(folder: Path) -> set[str]:
    return {key for key in read_manifest(checkpoint_files(folder)) if ".layers." not in key}


def is_tied(model: Any) -> bool:
    return isinstance(model.get_output_embeddings(), TiedHead)


def test_a_tied_weight_is_one_tensor_in_the_file_and_one_in_memory(folder: Path) -> None:
    model = load(folder)
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    assert isinstance(embedding, QuantEmbedding)
    parts = {f"model.embed_tokens.{part}" for part in ("qweight", "qzeros", "scales", "g_idx")}
    if model.config.tie_word_embeddings:
        assert stored(folder) == {*parts, "model.norm.weight"}
        assert is_tied(model)
        assert not [*head.parameters()]
        assert head.embedding is embedding
        assert embedding.by_token
    else:
        assert stored(folder) == {*parts, "model.norm.weight", "lm_head.weight"}
        assert type(head) is nn.Linear
        assert not embedding.by_token
    assert sum(p.numel() for name, p in model.named_parameters() if name.endswith("embed_tokens.weight")) == 0


def test_rows_and_products_are_those_of_the_dequantized_model(folder: Path) -> None:
    model = load(folder)
    found, tied = logits(model), is_tied(model)
    dense = copy.deepcopy(model).dequantize()
    assert type(dense.get_input_embeddings()) is nn.Embedding
    assert type(dense.get_output_embeddings()) is nn.Linear
    shared = dense.get_output_embeddings().weight is dense.get_input_embeddings().weight
    assert shared == tied == bool(dense.config.tie_word_embeddings)
    assert distance(found, logits(dense)) < 2e-3
    ids = torch.tensor([[5, 0, 17]])
    expected = dense.get_input_embeddings()(ids)
    assert torch.equal(model.get_input_embeddings()(ids), expected)
    assert torch.equal(model.get_input_embeddings().weight[ids[0]], expected[0])


def test_what_is_saved_again_is_the_same_to_the_bit(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert stored(tmp_path) == stored(folder)
    first, second = model.state_dict(), again.state_dict()
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(logits(model), logits(again))
    assert model.config.tie_word_embeddings == again.config.tie_word_embeddings == is_tied(again)


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_multiplies_with_its_own_embedding(folder: Path, duplicate: Any) -> None:
    model = load(folder)
    other = duplicate(model)
    assert torch.equal(logits(other), logits(model))
    if is_tied(model):
        assert other.get_output_embeddings().embedding is other.get_input_embeddings()
        assert other.get_input_embeddings() is not model.get_input_embeddings()


def test_tying_again_changes_nothing(folder: Path) -> None:
    model = load(folder)
    before = logits(model)
    model.tie_weights()
    assert torch.equal(logits(model), before)


def test_new_tokens_make_the_embedding_dense(folder: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = load(folder)
    before, tied, size = logits(model), is_tied(model), model.config.vocab_size
    model.resize_token_embeddings(size)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    model.resize_token_embeddings(size + 5)
    assert "model.embed_tokens is quantized, and new tokens need rows in full precision" in caplog.text
    assert model.get_input_embeddings().weight.shape[0] == size + 5
    assert (model.get_output_embeddings().weight is model.get_input_embeddings().weight) == tied
    assert distance(logits(model)[..., :size], before) < 2e-3
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_another_input_embedding_sets_the_head_free(folder: Path, tmp_path: Path) -> None:
    model, other = load(folder), nn.Embedding(VOCABULARY, 64)
    head = logits(model) if not is_tied(model) else model.get_output_embeddings().weight.clone()
    tied = is_tied(model)
    model.set_input_embeddings(other)
    if tied:  # as of any model: the old weight until they are tied again
        assert torch.equal(model.get_output_embeddings().weight, head)
        model.tie_weights()
    assert (model.get_output_embeddings().weight is other.weight) == tied
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_the_head_cannot_be_given_another_weight(folder: Path) -> None:
    model = load(folder)
    if is_tied(model):
        with pytest.raises(ConfigError, match=r"same quantized weight as model\.embed_tokens"):
            model.get_output_embeddings().weight = nn.Parameter(torch.zeros(2, 2))


def test_the_model_without_a_head_is_served(folder: Path) -> None:
    base = AutoModel.from_pretrained(folder)
    assert isinstance(base.get_input_embeddings(), QuantEmbedding)
    ids = torch.tensor([[5, 0, 17]])
    assert torch.equal(base(ids).last_hidden_state, load(folder).model(ids).last_hidden_state)


def test_decoding_and_casts(folder: Path) -> None:
    model, ids = load(folder), torch.tensor([[5, 8, 17]])
    assert model.dtype == torch.float32  # and not that of the scales
    expected = copy.deepcopy(model).dequantize().generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0), expected)
    model.to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.get_input_embeddings()(ids).dtype == torch.bfloat16
    assert model(ids).logits.dtype == torch.bfloat16


def test_a_compiled_model_is_the_same(folder: Path) -> None:
    model, ids = load(folder, quantization_config=GPTQConfig(bits=4, fuse=False)), torch.tensor([[5, 8, 17]])
    with torch.no_grad():
        expected = model(ids, use_cache=False).logits
        compiled = torch.compile(model, backend="eager", fullgraph=True)
        assert distance(compiled(ids, use_cache=False).logits, expected) < 1e-5


def test_gradients_pass_through_head_and_blocks(folder: Path) -> None:
    model, ids = load(folder), torch.tensor([[5, 8, 17]])
    dense = copy.deepcopy(model).dequantize()
    found, expected = (each.model.norm.weight for each in (model, dense))
    for each in (model, dense):
        each(ids, labels=ids).loss.backward()
    assert distance(found.grad, expected.grad) < 2e-3


def test_an_offloaded_model_is_the_same(folder: Path, tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "disk", "model.layers": "cpu", "model.norm": "cpu", "lm_head": "cpu"}
    device_map |= {"model.rotary_emb": "cpu"}
    model = load(folder, device_map=device_map, offload_folder=tmp_path)
    assert distance(logits(model), logits(load(folder))) < 1e-5


def test_what_a_model_cannot_share_is_refused(source: Path) -> None:
    with pytest.raises(ConfigError, match=r"embed_bits=3 is not supported; choose one of \(4, 5, 6, 7, 8\)"):
        settings(3)
    if LlamaForCausalLM.from_pretrained(source).config.tie_word_embeddings:
        with pytest.raises(ConfigError, match="ties them; leave lm_head out"):
            quantize(LlamaForCausalLM.from_pretrained(source), settings(8, lm_head=True), None)


@pytest.mark.parametrize("tied", [True, False])
def test_codes_of_six_bits_are_saved_and_read_and_become_wider_elsewhere(tied: bool, tmp_path: Path) -> None:
    tiny(vocab_size=288, tie_word_embeddings=tied).save_pretrained(tmp_path / "source")
    config = QuantizeConfig(bits=4, group_size=32, embed_bits=6, quality="fast", lm_head=not tied)
    quantize(tmp_path / "source", config, calibration(288), output=tmp_path / "model")
    model = load(tmp_path / "model")
    assert model.get_input_embeddings().stored_spec.bits == 6
    model.save_pretrained(tmp_path / "again")
    files = [load_file(tmp_path / name / "model.safetensors") for name in ("model", "again")]
    assert all(torch.equal(files[1][key], files[0][key]) for key in files[0] if "embed_tokens" in key)
    assert convert(tmp_path / "model", tmp_path / "plain", "gptq").exact
    plain = load(tmp_path / "plain")
    assert plain.config.quantization_config.checkpoint_format == "gptq"
    assert plain.get_input_embeddings().stored_spec.bits == 8
    assert torch.equal(logits(plain), logits(model))


def test_a_head_of_its_own_is_quantized_beside(source: Path, tmp_path: Path) -> None:
    model = LlamaForCausalLM.from_pretrained(source)
    if model.config.tie_word_embeddings:
        pytest.skip("it has none")
    rules = {"lm_head": {"bits": 8}}
    quantize(model, settings(4, lm_head=True, dynamic=rules), None)
    model.save_pretrained(tmp_path)
    again = load(tmp_path)
    assert type(again.get_output_embeddings()) is QuantLinear
    assert (again.get_output_embeddings().spec.bits, again.get_input_embeddings().spec.bits) == (8, 4)
    assert torch.equal(logits(again), logits(model))


def test_a_head_in_the_file_is_never_tied_and_a_missing_one_makes_an_embedding_by_channel_dense(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = LlamaForCausalLM.from_pretrained(source)
    if model.config.tie_word_embeddings:
        pytest.skip("its embedding is by token")
    quantize(model, settings(8), None)
    model.config.tie_word_embeddings = True
    model.save_pretrained(tmp_path)
    again = load(tmp_path)  # the head is there, so it is not tied
    assert not again.config.tie_word_embeddings
    assert torch.equal(logits(again), logits(model))
    state = load_file(tmp_path / "model.safetensors")
    del state["lm_head.weight"]
    save_file(state, tmp_path / "model.safetensors", {"format": "pt"})
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    again = load(tmp_path)
    assert "packed along its tokens" in caplog.text
    assert again.get_output_embeddings().weight is again.get_input_embeddings().weight
    expected = model.get_input_embeddings().weight
    assert torch.equal(again.get_input_embeddings().weight, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_embedding_that_scales_its_rows_still_does(dtype: torch.dtype, tmp_path: Path) -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16}
    config = Gemma3TextConfig(vocab_size=160, num_attention_heads=4, num_key_value_heads=2, **sizes)
    model = Gemma3ForCausalLM(config).to(dtype)
    quantize(model, settings(8), None)
    model.save_pretrained(tmp_path)
    again, ids = load(tmp_path, dtype=dtype), torch.tensor([[5, 0, 17]])
    dense = copy.deepcopy(again).dequantize()
    assert is_tied(again)
    assert type(dense.get_input_embeddings()).__name__ == "Gemma3TextScaledWordEmbedding"
    assert torch.equal(again.get_input_embeddings()(ids), dense.get_input_embeddings()(ids))
    assert torch.equal(model.get_input_embeddings()(ids), dense.get_input_embeddings()(ids))


def test_a_cast_rounds_the_scale_of_rows_as_that_of_a_dense_embedding() -> None:
    """64 channels would be scaled by 8, which every dtype holds."""
    sizes = {"hidden_size": 96, "intermediate_size": 96, "num_hidden_layers": 1, "head_dim": 16}
    config = Gemma3TextConfig(vocab_size=160, num_attention_heads=4, num_key_value_heads=2, **sizes)
    model, ids = Gemma3ForCausalLM(config), torch.tensor([[5, 0, 17]])
    quantize(model, settings(8), None)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        dense = model.get_input_embeddings().dequantize(torch.float32)
        model.to(dtype)
        assert torch.equal(model.get_input_embeddings()(ids), dense.to(dtype)(ids))


def test_a_model_is_quantized_while_it_is_loaded(source: Path, tmp_path: Path) -> None:
    config = GPTQConfig(bits=4, group_size=32, embed_bits=8, dataset=calibration(100), quality="fast")
    model = load(source, quantization_config=config)
    assert isinstance(model.get_input_embeddings(), QuantEmbedding)
    assert is_tied(model) == bool(model.config.tie_word_embeddings)
    model.save_pretrained(tmp_path)
    assert torch.equal(logits(load(tmp_path)), logits(model))


def test_an_original_that_stores_its_tied_head_too_loses_nothing_and_gains_nothing(
    source: Path, tmp_path: Path
) -> None:
    model = LlamaForCausalLM.from_pretrained(source)
    if not model.config.tie_word_embeddings:
        pytest.skip("its head is another weight")
    shutil.copytree(source, tmp_path / "twice")
    state = load_file(tmp_path / "twice" / "model.safetensors")
    state["lm_head.weight"] = state["model.embed_tokens.weight"].clone()
    save_file(state, tmp_path / "twice" / "model.safetensors", {"format": "pt"})
    quantize(tmp_path / "twice", settings(8), None, output=tmp_path / "out")
    assert not any("lm_head" in key for key in stored(tmp_path / "out"))
    assert is_tied(load(tmp_path / "out"))
