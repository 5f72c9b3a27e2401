"""Plain ``from_pretrained`` on checkpoints of a peer and on every dialect found in the wild."""

from __future__ import annotations

import json
import logging
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModel

from gptq_backend import QuantizeConfig, QuantLinear
from gptq_backend.algorithm.gptq import quantize_weight
from gptq_backend.format import encode, packing
from gptq_cli.checkpoint import read_checkpoint
from gptq_transformers.loading.prepare import name_patterns
from tests.transformers.checkpoints import (
    NAMES,
    PEERS,
    VERSION_4,
    distance,
    load,
    load_peer,
    logits,
    peer_error,
    rewrite,
    stored,
    tiny,
    write,
)

EXACT = 1e-5


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


@pytest.mark.parametrize("name", NAMES)
def test_a_peers_checkpoint_gives_its_logits(name: str) -> None:
    assert peer_error(load_peer(name, dtype=torch.float32), name) < 1e-3
    assert peer_error(load_peer(name, dtype=torch.bfloat16), name) < 3e-2


@pytest.mark.parametrize("name", NAMES)
def test_weights_stay_packed_in_memory(name: str) -> None:
    model = load_peer(name, dtype=torch.bfloat16)
    tensors = load_file(PEERS / name / "model.safetensors")
    layers = [module for module in model.modules() if isinstance(module, QuantLinear)]
    assert len(layers) == sum(key.endswith(".qweight") for key in tensors)
    packed = sum(t.nbytes for t in tensors.values())
    resident = sum(t.nbytes for t in {id(p): p for p in model.parameters()}.values())
    assert resident <= 1.1 * packed


CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "asym with act-order": ("llama", {"sym": False, "desc_act": True, "group_size": 32}, {}),
    "2 bits": ("llama", {"bits": 2, "group_size": 32}, {}),
    "2 bits, asym, v2": ("llama", {"bits": 2, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}, {}),
    "3 bits in planes": ("llama", {"bits": 3, "group_size": 32, "checkpoint_format": "gptq_p"}, {}),
    "5 bits": ("llama", {"bits": 5, "group_size": 32}, {}),
    "6 bits, asym with act-order": ("llama", {"bits": 6, "group_size": 32, "sym": False, "desc_act": True}, {}),
    "7 bits beside 3 in planes": ("llama", {"bits": 3, "group_size": 32, "dynamic": {".*down_proj": {"bits": 7}}}, {}),
    "mixtral, 5 bits": ("mixtral", {"bits": 5, "group_size": 32}, {}),
    "8 bits, one group": ("llama", {"bits": 8, "group_size": -1, "sym": False}, {}),
    "a ragged group": ("llama", {"group_size": 40}, {}),
    "a ragged group with act-order": ("llama", {"group_size": 40, "desc_act": True}, {}),
    "gemma3": ("gemma3", {"group_size": 32}, {}),
    "gpt2": ("gpt2", {"group_size": 32}, {}),
    "mixtral": ("mixtral", {"group_size": 32}, {}),
    "mixtral, some experts dense": ("mixtral", {"group_size": 32, "dynamic": {r"-:.*\.0\..*experts\.1\.": {}}}, {}),
    "mixtral, one expert asym": ("mixtral", {"group_size": 32, "dynamic": {r".*experts\.1\.": {"sym": False}}}, {}),
    "qwen3": ("qwen3", {"group_size": 32}, {}),
    "an 8-bit head": ("llama", {"group_size": 32, "lm_head": True, "dynamic": {"lm_head": {"bits": 8}}}, {}),
    "an 8-bit head, asym": (
        "llama",
        {"group_size": 32, "sym": False, "lm_head": True, "dynamic": {"lm_head": {"bits": 8}}},
        {},
    ),
    "a quantized head where embeddings were tied": (
        "llama",
        {"group_size": 32, "lm_head": True},
        {"tie_word_embeddings": True},
    ),
    "a tied head left dense": ("llama", {"group_size": 32}, {"tie_word_embeddings": True}),
}


@pytest.mark.parametrize("case", CASES)
def test_every_option_of_the_quantizer_survives_the_file(case: str, folder: Path) -> None:
    model_type, settings, changes = CASES[case]
    expected = write(folder, tiny(model_type, **changes), QuantizeConfig(**settings))
    model = load(folder)
    assert any(isinstance(module, QuantLinear) for module in model.modules())
    assert distance(logits(model), expected) < EXACT
    assert distance(logits(load(folder, dtype=torch.bfloat16)), expected) < 3e-2
    before, again = stored(folder), folder.with_name("again")
    load(folder, dtype=torch.bfloat16).save_pretrained(again)
    after = stored(again)
    assert before.keys() == after.keys()
    for key, value in before.items():
        if f"{key.rpartition('.')[0]}.qweight" in before:
            assert value.dtype == after[key].dtype, key
            assert torch.equal(value, after[key]), key


def _drop(suffix: str) -> Any:
    return lambda tensors: {key: value for key, value in tensors.items() if not key.endswith(suffix)}


def _replace(suffix: str, change: Any) -> Any:
    return lambda tensors: {key: change(value) if key.endswith(suffix) else value for key, value in tensors.items()}


def _as_words(dtype: torch.dtype) -> Any:
    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        size = dtype.itemsize * 8
        for key, value in tensors.items():
            if key.endswith(("qweight", "qzeros")):
                dim = 0 if key.endswith("qweight") else 1
                bits = value.shape[dim] * 32
                tensors[key] = packing.from_int32_words(value, dtype, dim, -(-bits // size))
        return tensors

    return change


def _v2_zeros(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return _replace("qzeros", lambda words: torch.full_like(words, -0x77777778))(tensors)


DIALECTS: dict[str, tuple[Any, dict[str, Any]]] = {
    "no g_idx": (_drop("g_idx"), {}),
    "an empty g_idx": (_replace("g_idx", lambda value: value[:0]), {}),
    "an int64 g_idx": (_replace("g_idx", lambda value: value.long()), {}),
    "the desc_act flag without act-order": (None, {"desc_act": True}),
    "v2 zeros under a v1 label": (_v2_zeros, {}),
    "v2 zeros, labelled so": (_v2_zeros, {"checkpoint_format": "gptq_v2", "format": "gptq_v2"}),
    "int8 words": (_as_words(torch.int8), {"pack_dtype": "int8"}),
    "int16 words": (_as_words(torch.int16), {"pack_dtype": "int16"}),
    "int64 words": (_as_words(torch.int64), {"pack_dtype": "int64"}),
    "bf16 scales": (_replace("scales", lambda value: value.bfloat16()), {}),
    "extras of TGI": (
        lambda tensors: {**tensors, "gptq_bits": torch.tensor([4]), "gptq_groupsize": torch.tensor([32])},
        {},
    ),
    "aliased keys": (
        None,
        {"bits": ..., "wbits": 4, "group_size": ..., "q_group_size": 32, "checkpoint_format": ..., "format": "gptq"},
    ),
    "no format key": (None, {"checkpoint_format": ..., "format": ...}),
    "a wrong module list": (None, {"modules_in_block_to_quantize": [["self_attn.q_proj"]]}),
    "wrong bits in the config": (None, {"bits": 8}),
    "a wrong group size in the config": (None, {"group_size": 64}),
    "an export of AutoRound": (None, {"autoround_version": "0.9", "iters": 200, "nsamples": 128}),
}


@pytest.mark.parametrize("dialect", DIALECTS)
def test_every_dialect_is_read_and_saved_as_it_was(dialect: str, folder: Path) -> None:
    change, settings = DIALECTS[dialect]
    expected = write(folder, tiny(), QuantizeConfig(group_size=32))
    rewrite(folder, change, **settings)
    bound = 5e-3 if dialect == "bf16 scales" else EXACT
    model = load(folder)
    assert distance(logits(model), expected) < bound
    before, again = stored(folder), folder.with_name("again")
    model.save_pretrained(again)
    assert distance(logits(load(again)), expected) < bound
    after = stored(again)
    for key, value in before.items():
        if not key.startswith("gptq_") and not (VERSION_4 and value.numel() == 0):
            assert key in after, key
            assert value.dtype == after[key].dtype, key
            assert torch.equal(value, after[key]), key


@pytest.mark.parametrize("value", [0.0, 0.5])
def test_a_bias_that_the_model_does_not_know_is_kept_unless_zero(
    value: float, folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = write(folder, tiny(), QuantizeConfig(group_size=32))
    name = "model.layers.1.mlp.down_proj"
    rewrite(folder, lambda tensors: {**tensors, f"{name}.bias": torch.full((64,), value, dtype=torch.float16)})
    with caplog.at_level(logging.WARNING):
        model = load(folder)
    layer = model.get_submodule(name)
    assert (layer.bias is None) == (value == 0)
    assert (distance(logits(model), expected) < EXACT) == (value == 0)


def test_dense_and_8_bit_layers_load_without_the_rules_that_made_them(folder: Path) -> None:
    config = QuantizeConfig(group_size=32, dynamic={r"-:.*\.0\.self_attn\.o_proj": {}, r".*\.mlp\..*": {"bits": 8}})
    expected = write(folder, tiny(), config)
    rewrite(folder, dynamic=...)  # a published config may miss its rules
    model = load(folder)
    assert isinstance(model.model.layers[0].self_attn.o_proj, torch.nn.Linear)
    assert model.model.layers[1].mlp.up_proj.spec.bits == 8
    assert distance(logits(model), expected) < EXACT


def test_a_quantized_router_is_dequantized(folder: Path) -> None:
    settings = QuantizeConfig(group_size=32)
    model = tiny("mixtral")
    name = next(key for key, _ in model.named_parameters() if key.endswith("gate.weight"))
    router = quantize_weight(model.get_parameter(name).detach(), None, settings, 0, name="router").weight
    model.get_parameter(name).data = router.dequantize()
    expected = write(folder, model, settings)

    def quantize_router(tensors: dict[str, Tensor]) -> None:
        key = next(key for key in tensors if key.endswith("0.block_sparse_moe.gate.weight")).removesuffix("weight")
        del tensors[f"{key}weight"]
        tensors.update({key + part: value for part, value in encode(router)[1].items()})

    rewrite(folder, quantize_router)
    assert not read_checkpoint(folder).damaged
    model = load(folder)
    assert distance(logits(model), expected) < EXACT
    model.save_pretrained(folder.with_name("again"))
    assert distance(logits(load(folder.with_name("again"))), expected) < EXACT


@pytest.mark.parametrize("tied", [False, True])
def test_a_quantized_embedding_is_read_as_a_product_with_one_hot_rows(tied: bool, folder: Path) -> None:
    settings = QuantizeConfig(group_size=32)
    model = tiny(tie_word_embeddings=tied)
    table = model.get_input_embeddings().weight
    packed = quantize_weight(table.detach().t(), None, QuantizeConfig(bits=8, group_size=32), 0, name="table").weight
    table.data = packed.dequantize().t().contiguous()
    expected = write(folder, model, settings)

    def quantize_table(tensors: dict[str, Tensor]) -> None:
        del tensors["model.embed_tokens.weight"]
        tensors.update({f"model.embed_tokens.{part}": value for part, value in encode(packed)[1].items()})

    rewrite(folder, quantize_table)
    assert not read_checkpoint(folder).damaged
    model = load(folder)
    assert distance(logits(model), expected) < EXACT
    model.save_pretrained(folder.with_name("again"))
    assert distance(logits(load(folder.with_name("again"))), expected) < EXACT


def test_the_base_model_of_a_checkpoint_loads_alone(folder: Path) -> None:
    model = tiny()
    write(folder, model, QuantizeConfig(group_size=32, lm_head=True))
    base = AutoModel.from_pretrained(folder, dtype=torch.float32)
    assert sum(isinstance(module, QuantLinear) for module in base.modules()) == 14
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        assert distance(base(ids).last_hidden_state, load(folder).model(ids).last_hidden_state) < EXACT


def test_pickled_weights_are_read(folder: Path) -> None:
    expected = write(folder, tiny(), QuantizeConfig(group_size=32))
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    assert distance(logits(load(folder)), expected) < EXACT
    assert distance(logits(load(folder, dtype=torch.bfloat16)), expected) < 3e-2


def test_keys_that_nobody_knows_are_saved_again(folder: Path) -> None:
    rules = {"-:.*o_proj": {}}
    write(folder, tiny(), QuantizeConfig(group_size=32, dynamic=rules))
    extra = {"static_groups": True, "lm_head": False, "meta": {"quantizer": ["x:1"]}, "novel": [1, {"a": 2}]}
    rewrite(folder, **extra)
    again = folder.with_name("again")
    load(folder, dtype=torch.float16).save_pretrained(again)
    saved = json.loads((again / "config.json").read_text())["quantization_config"]
    assert saved["dynamic"] == rules
    assert {key: saved[key] for key in extra} == extra
    assert saved["quant_method"] == "gptq"
    assert "backend" not in saved
    assert "tokenizer" not in saved


@given(st.sets(st.tuples(st.integers(0, 12), st.integers(0, 2), st.sampled_from(["weight", "bias"]))), st.data())
def test_patterns_of_names_are_for_these_alone(keys: set[tuple[int, int, str]], data: st.DataObject) -> None:
    names = {f"model.layers.{n}.experts.{e}.{part}" for n, e, part in keys}
    chosen = {name for name in names if data.draw(st.booleans())}
    patterns = name_patterns(chosen, names)
    assert {name for name in names if any(re.search(pattern, name) for pattern in patterns)} == chosen
    assert len(name_patterns(names, names)) <= 2  # of weights and of biases
