"""Models whose code reads the weight of quantized layers, ties it or resizes it; encoder-decoders; dequantizing."""

from __future__ import annotations

import copy
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, T5Config, T5ForConditionalGeneration

import gptq_transformers
from gptq_backend import CheckpointError, ConfigError, QuantizeConfig, QuantLinear
from tests.transformers.checkpoints import VERSION_4, VOCABULARY, distance, ids, load, logits, rewrite, tiny, write

GROUP = 32


def packed(weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
    """A 4-bit symmetric layer written from docs/format.md alone, and the weight that it means. weight: [N, K]."""
    outputs, features = weight.shape
    groups = weight.float().reshape(outputs, features // GROUP, GROUP)
    scales = (groups.abs().amax(-1) * 2 / 15).half()  # [N, G]
    codes = (groups / scales.float().unsqueeze(-1) + 8).round().clamp(0, 15).reshape(outputs, features).long()
    shifts = torch.arange(8) * 4
    words = (codes.t().reshape(-1, 8, outputs) << shifts[None, :, None]).sum(1)  # [K/8, N]
    zero = sum(7 << shift for shift in shifts.tolist())  # stored zeros are one less than the 8 they mean
    signed = lambda tensor: torch.where(tensor >= 1 << 31, tensor - (1 << 32), tensor).int()  # noqa: E731
    tensors = {
        "qweight": signed(words),
        "qzeros": signed(torch.full((features // GROUP, outputs // 8), zero)),
        "scales": scales.t().contiguous(),
        "g_idx": (torch.arange(features) // GROUP).int(),
    }
    return tensors, ((codes - 8).float() * scales.float().repeat_interleave(GROUP, 1))


def pack_folder(model: nn.Module, folder: Path, wanted: Any) -> tuple[Path, Path]:
    """Save ``model`` twice: with packed layers where ``wanted(name)``, and with what they mean -> the two folders."""
    quantized, dense = folder / "quantized", folder / "dense"
    for path in (quantized, dense):
        model.save_pretrained(path)
    state, meant = load_file(dense / "model.safetensors"), {}
    if wanted("lm_head") and "lm_head.weight" not in state:
        state["lm_head.weight"] = model.get_output_embeddings().weight.detach().clone()
    for key in [key for key in state if key.endswith(".weight") and state[key].dim() == 2 and wanted(key[:-7])]:
        tensors, meant[key] = packed(state.pop(key))
        state.update({f"{key[:-7]}.{part}": tensor for part, tensor in tensors.items()})
    save_file(load_file(dense / "model.safetensors") | meant, dense / "model.safetensors", {"format": "pt"})
    save_file(state, quantized / "model.safetensors", {"format": "pt"})
    config = json.loads((quantized / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4, "group_size": GROUP, "desc_act": False}
    (quantized / "config.json").write_text(json.dumps(config))
    return quantized, dense


def t5(activation: str, **more: Any) -> nn.Module:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=128,
        d_model=64,
        d_kv=16,
        d_ff=96,
        num_layers=2,
        num_heads=4,
        feed_forward_proj=activation,
        decoder_start_token_id=0,
        **more,
    )
    model = T5ForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.1) if parameter.dim() > 1 else parameter.data.add_(torch.randn(()) * 0.05)
    return model


@torch.no_grad()
def seq2seq(model: nn.Module) -> Tensor:
    inputs, outputs = ids(12) % 128, ids(7) % 128
    return model(input_ids=inputs, decoder_input_ids=outputs).logits.float()


def in_blocks(name: str) -> bool:
    return "block" in name and "relative" not in name


@pytest.mark.parametrize("activation", ["relu", "gated-gelu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_t5_packed_elsewhere_gives_the_logits_of_its_dense_twin(
    activation: str, dtype: torch.dtype, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    quantized, dense = pack_folder(t5(activation), tmp_path, in_blocks)
    expected = seq2seq(AutoModelForSeq2SeqLM.from_pretrained(dense, dtype=torch.float32))
    twin = AutoModelForSeq2SeqLM.from_pretrained(dense, dtype=dtype)
    with caplog.at_level(logging.WARNING, "gptq_backend"):
        loaded = AutoModelForSeq2SeqLM.from_pretrained(quantized, dtype=dtype)
        found = seq2seq(loaded)
    assert not [record for record in caplog.records if "reads the weight" in record.getMessage()]
    assert distance(found, expected) < (1e-4 if dtype == torch.float32 else 1.2 * distance(seq2seq(twin), expected))
    for name, layer in loaded.named_modules():
        if isinstance(layer, QuantLinear):
            assert layer.weight.dtype == twin.get_submodule(name).weight.dtype, name
    loaded.generate(ids(5) % 128, max_new_tokens=3)


@pytest.mark.skipif(VERSION_4, reason="version 4 ties the head by assignment, which a quantized one refuses")
@pytest.mark.parametrize("again", [False, True])
def test_a_quantized_head_of_a_t5_that_ties_it_keeps_the_models_scaling(again: bool, tmp_path: Path) -> None:
    quantized, dense = pack_folder(t5("relu"), tmp_path, lambda name: in_blocks(name) or name == "lm_head")
    twin, loaded = (AutoModelForSeq2SeqLM.from_pretrained(f, dtype=torch.float32) for f in (dense, quantized))
    if again:
        loaded.save_pretrained(tmp_path / "again")
        loaded = AutoModelForSeq2SeqLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert isinstance(loaded.lm_head, QuantLinear)
    assert distance(seq2seq(loaded), seq2seq(twin)) < 1e-4


# -- the output embedding ----------------------------------------------------------------------------------------------


def with_quantized_head(tied: bool, folder: Path) -> tuple[nn.Module, nn.Module]:
    """A model loaded from ``folder`` and its dense twin."""
    model = tiny("llama", vocab_size=264, tie_word_embeddings=tied)
    gptq_transformers.quantize(model, QuantizeConfig(group_size=32, lm_head=True), [ids(32)[0]], output=folder)
    loaded = load(folder)
    return loaded, copy.deepcopy(loaded).dequantize()


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("arguments", "rows"),
    [({"new_num_tokens": 280}, 280), ({"new_num_tokens": 200}, 200), ({"pad_to_multiple_of": 64}, 320)],
)
def test_a_quantized_head_is_dequantized_where_its_size_changes(
    arguments: dict[str, int], rows: int, tied: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, twin = with_quantized_head(tied, tmp_path / "model")
    kept = min(rows, 264)
    prompt = ids(8) % kept
    expected = logits(twin, prompt)[..., :kept]
    assert isinstance(model.lm_head, QuantLinear)
    with caplog.at_level(logging.WARNING, "gptq_transformers"):
        embedding = model.resize_token_embeddings(mean_resizing=False, **arguments)
    assert any("lm_head is quantized" in record.getMessage() for record in caplog.records)
    assert embedding.weight.shape[0] == model.lm_head.weight.shape[0] == model.config.vocab_size == rows
    assert distance(logits(model, prompt)[..., :kept], expected) < 1e-5
    model.save_pretrained(tmp_path / "again")
    again = load(tmp_path / "again")
    assert distance(logits(again, prompt), logits(model, prompt)) < 1e-5


@pytest.mark.parametrize("arguments", [{}, {"new_num_tokens": 264}, {"pad_to_multiple_of": 8}])
def test_a_quantized_head_stays_where_its_size_does(arguments: dict[str, int], tmp_path: Path) -> None:
    model, _ = with_quantized_head(False, tmp_path)
    head, expected = model.lm_head, logits(model)
    model.resize_token_embeddings(**arguments)
    assert model.lm_head is head
    assert torch.equal(logits(model), expected)


def test_a_copy_resizes_itself_and_not_the_original(tmp_path: Path) -> None:
    model, _ = with_quantized_head(False, tmp_path)
    other = copy.deepcopy(model)
    other.resize_token_embeddings(300, mean_resizing=False)
    assert (other.config.vocab_size, other.lm_head.out_features) == (300, 300)
    assert isinstance(model.lm_head, QuantLinear)
    assert model.get_input_embeddings().weight.shape[0] == 264


def test_tying_a_weight_to_a_quantized_head_is_refused(tmp_path: Path) -> None:
    model, _ = with_quantized_head(False, tmp_path)
    with pytest.raises(ConfigError, match=r"lm_head\.weight is quantized and cannot be assigned or tied"):
        model.lm_head.weight = model.get_input_embeddings().weight


# -- dequantizing ------------------------------------------------------------------------------------------------------


def test_dequantizing_casts_parameters_and_no_buffers(tmp_path: Path) -> None:
    write(tmp_path, tiny(), QuantizeConfig(group_size=32))
    model = load(tmp_path)
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.hf_quantizer.dequantize(model, torch.bfloat16)  # version 4 has no argument for it
    assert any("inv_freq" in name for name in before)
    for name, buffer in model.named_buffers():
        assert buffer.dtype == before[name].dtype, name
        assert torch.equal(buffer, before[name]), name
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


@pytest.mark.parametrize("loaded_in", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("asked", [None, torch.float16, torch.bfloat16, torch.float32])
def test_a_dequantized_model_has_the_dtypes_of_a_dense_one(
    loaded_in: torch.dtype, asked: torch.dtype | None, tmp_path: Path
) -> None:
    """T5 keeps a layer of its feed-forward in float32 where the rest is float16."""
    quantized, dense = pack_folder(t5("relu"), tmp_path, in_blocks)
    model = AutoModelForSeq2SeqLM.from_pretrained(quantized, dtype=loaded_in)
    model.hf_quantizer.dequantize(model, asked)
    twin = AutoModelForSeq2SeqLM.from_pretrained(dense, dtype=asked or loaded_in)
    if (loaded_in, asked) == (torch.float16, torch.bfloat16):  # what was kept in float32 stays there
        twin = AutoModelForSeq2SeqLM.from_pretrained(dense, dtype=loaded_in)
        for parameter in twin.parameters():
            parameter.data = parameter.data.to(asked if parameter.dtype == loaded_in else parameter.dtype)
    assert {n: p.dtype for n, p in model.named_parameters()} == {n: p.dtype for n, p in twin.named_parameters()}


# -- values that are not finite ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"])
def test_dense_values_that_are_not_finite_are_refused_with_tensor_and_file(
    name: str, dtype: torch.dtype, value: float, tmp_path: Path
) -> None:
    write(tmp_path, tiny(), QuantizeConfig(group_size=32))
    rewrite(tmp_path, lambda tensors: tensors[name].view(-1)[-1:].fill_(value) and None)
    with pytest.raises(CheckpointError, match=rf"{name}: 1 values in model\.safetensors are NaN or infinite"):
        load(tmp_path, dtype=dtype)


@pytest.mark.parametrize("tensor", ["bias", "scales"])
def test_values_of_quantized_layers_that_are_not_finite_are_refused(tensor: str, tmp_path: Path) -> None:
    model = tiny("llama", attention_bias=True)
    write(tmp_path, model, QuantizeConfig(group_size=32))
    name = f"model.layers.1.self_attn.q_proj.{tensor}"
    rewrite(tmp_path, lambda tensors: tensors[name].view(-1)[-1:].fill_(float("nan")) and None)
    with pytest.raises(CheckpointError, match=rf"{name}: 1 values are NaN"):
        load(tmp_path)


def test_values_too_large_for_the_dtype_asked_for_are_no_damage(tmp_path: Path) -> None:
    write(tmp_path, tiny(), QuantizeConfig(group_size=32))
    rewrite(tmp_path, lambda tensors: tensors["model.norm.weight"][:1].fill_(1e5) and None)
    with pytest.raises(ConfigError, match=r"model\.norm\.weight: 1 of its values are too large for torch\.float16"):
        load(tmp_path, dtype=torch.float16)
    load(tmp_path, dtype=torch.bfloat16)


# -- a loaded model and its layers -------------------------------------------------------------------------------------


def test_an_adapters_state_dict_leaves_all_layers_prepared(tmp_path: Path) -> None:
    write(tmp_path, tiny("mixtral"), QuantizeConfig(group_size=32))
    model = load(tmp_path)
    before = {name: parameter.data_ptr() for name, parameter in model.named_parameters()}
    expected = logits(model)
    model.adapter = nn.Linear(4, 4)
    model.load_state_dict({"adapter.weight": torch.zeros(4, 4)}, strict=False)
    after = {name: parameter.data_ptr() for name, parameter in model.named_parameters() if "adapter" not in name}
    assert after == before
    assert torch.equal(logits(model), expected)


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_all_of_a_loaded_model_can_be_in_shared_memory(model_type: str, tmp_path: Path) -> None:
    write(tmp_path, tiny(model_type), QuantizeConfig(group_size=32))
    model = load(tmp_path)
    expected = logits(model)
    model.share_memory()
    assert torch.equal(logits(model), expected)
    assert all(parameter.is_shared() for parameter in model.parameters())


@pytest.mark.parametrize("model_type", ["llama", "mixtral"])
def test_an_emptied_model_takes_a_state_dict(model_type: str, tmp_path: Path) -> None:
    write(tmp_path, tiny(model_type), QuantizeConfig(group_size=32))
    model = load(tmp_path)
    state, expected = {key: value.clone() for key, value in model.state_dict().items()}, logits(model)
    buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
    model.to_empty(device="cpu")
    model.load_state_dict(state)
    for name, buffer in model.named_buffers():
        buffer.copy_(buffers[name])
    assert distance(logits(model), expected) < 1e-6  # the first call prepares, and runs module by module


@pytest.mark.parametrize("backend", ["triton", "cuda"])
def test_a_backend_of_old_code_that_this_machine_lacks_means_auto(
    backend: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine may have it")
    from gptq_transformers import config

    config._warn_foreign.cache_clear()
    expected = write(tmp_path, tiny(), QuantizeConfig(group_size=32))
    with caplog.at_level(logging.WARNING, "gptq_transformers"):
        model = load(tmp_path, quantization_config=transformers.GPTQConfig(bits=4, backend=backend))
    assert distance(logits(model), expected) < 1e-3
    assert any(f"backend={backend!r}: serves" in record.getMessage() for record in caplog.records)


def test_a_loaded_causal_model_reads_its_weights_like_a_dense_one(tmp_path: Path) -> None:
    write(tmp_path, tiny(), QuantizeConfig(group_size=32))
    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    twin = copy.deepcopy(model).dequantize()
    for name, layer in model.named_modules():
        if isinstance(layer, QuantLinear):
            assert torch.equal(layer.weight, twin.get_submodule(name).weight), name
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY
