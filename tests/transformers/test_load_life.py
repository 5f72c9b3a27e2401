"""What happens to a loaded model: cast, copied, pickled, offloaded, compiled, saved, dequantized."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from torch import nn

from gptq_backend import ConfigError, QuantizeConfig, QuantLinear
from tests.transformers.checkpoints import (
    PEERS,
    VERSION_4,
    distance,
    ids,
    load,
    load_peer,
    logits,
    peer_error,
    stored,
    tiny,
    write,
)

NAMES = ["llama-4-64-actorder", "opt-4-32", "qwen3_moe-4-32"]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def _through_torch_save(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


CHANGES: dict[str, Any] = {
    "half": lambda model: model.half(),
    "to(float16)": lambda model: model.to(torch.float16),
    "to(bfloat16)": lambda model: model.to(dtype=torch.bfloat16),
    "bfloat16 and back": lambda model: model.bfloat16().float(),
    "to(device)": lambda model: model.to("cpu"),
    "deepcopy": copy.deepcopy,
    "deepcopy of a cast one": lambda model: copy.deepcopy(model.half()).float(),
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _through_torch_save,
    "a cast copy": lambda model: _through_torch_save(model).half(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_changes_of_the_model_keep_its_logits_and_packed_tensors(name: str, change: str) -> None:
    model = CHANGES[change](load_peer(name, dtype=torch.float32))
    quantized = {k: v for k, v in stored(PEERS / name).items() if k.endswith(("qweight", "qzeros", "scales", "g_idx"))}
    state = model.state_dict()
    assert all(torch.equal(state[key], value) and state[key].dtype == value.dtype for key, value in quantized.items())
    assert peer_error(model, name) < 3e-2
    if next(model.parameters()).dtype == torch.float32 and change != "bfloat16 and back":
        assert peer_error(model, name) < 1e-3


def test_casting_a_copy_leaves_the_original_alone() -> None:
    model = load_peer("llama-4-32-sym", dtype=torch.float32)
    other = copy.deepcopy(model).half()
    assert other.dtype == torch.float16
    assert model.dtype == torch.float32


@pytest.mark.parametrize("device_map", ["cpu", "auto", {"": "cpu"}])
def test_a_model_loaded_with_a_device_map_gives_its_logits(device_map: Any) -> None:
    model = load_peer("llama-4-64-actorder", dtype=torch.float32, device_map=device_map)
    assert peer_error(model, "llama-4-64-actorder") < 1e-3


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_on_disk_compute_and_save_what_they_hold(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    if VERSION_4 and "moe" in name:
        pytest.skip("the config is transformers 5's")
    prefix = "model.decoder." if "opt" in name else "model."
    parts = ["embed_tokens", "embed_positions", "final_layer_norm", "norm", "rotary_emb"]
    device_map = {prefix + part: "cpu" for part in parts} | {"lm_head": "cpu"}
    device_map |= {f"{prefix}layers.0": "disk", f"{prefix}layers.1": "cpu"}
    model = load_peer(name, dtype=dtype, device_map=device_map, offload_folder=tmp_path / "offload")
    assert any(parameter.is_meta for parameter in model.parameters())
    bound = 1e-3 if dtype == torch.float32 else 3e-2
    assert peer_error(model, name) < bound
    assert peer_error(model, name) < bound
    model.save_pretrained(tmp_path / "again")
    before, after = stored(PEERS / name), stored(tmp_path / "again")
    for key, value in before.items():
        if f"{key.rpartition('.')[0]}.qweight" in before:
            assert value.dtype == after[key].dtype, key
            assert torch.equal(value, after[key]), key


def test_a_prepared_model_can_be_offloaded(name: str) -> None:
    model = load_peer(name, dtype=torch.float32)
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    assert peer_error(model, name) < 1e-3
    assert peer_error(model, name) < 1e-3


@pytest.mark.parametrize("shard", ["5GB", "100KB"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_saving_keeps_every_byte_of_a_quantized_layer(
    name: str, dtype: torch.dtype, shard: str, tmp_path: Path
) -> None:
    load_peer(name, dtype=dtype).save_pretrained(tmp_path, max_shard_size=shard)
    assert (len(list(tmp_path.glob("*.safetensors"))) > 1) == (shard == "100KB")
    before, after = stored(PEERS / name), stored(tmp_path)
    assert before.keys() == after.keys()
    for key, value in before.items():
        if f"{key.rpartition('.')[0]}.qweight" in before:
            assert value.dtype == after[key].dtype, key
            assert torch.equal(value, after[key]), key
    if dtype == torch.float32:
        assert peer_error(load(tmp_path), name) < 1e-3


@pytest.mark.parametrize("model_type", ["llama", "gpt2", "mixtral"])
def test_a_dequantized_model_is_saved_as_an_ordinary_one(model_type: str, tmp_path: Path) -> None:
    expected = write(tmp_path / "model", tiny(model_type), QuantizeConfig(group_size=32))
    model = load(tmp_path / "model")
    model.dequantize()
    assert not any(isinstance(module, QuantLinear) for module in model.modules())
    assert not hasattr(model.config, "quantization_config")
    assert distance(logits(model), expected) < 1e-5
    model.save_pretrained(tmp_path / "dense")
    again = load(tmp_path / "dense")
    assert getattr(again.config, "quantization_config", None) is None
    assert distance(logits(again), expected) < 1e-5


def test_dequantizing_keeps_the_models_dtype(tmp_path: Path) -> None:
    write(tmp_path, tiny(), QuantizeConfig(group_size=32))
    model = load(tmp_path, dtype=torch.bfloat16)
    model.dequantize()
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}


def test_the_model_compiles_into_one_graph() -> None:
    name = "llama-4-64-actorder"
    model = load_peer(name, dtype=torch.float32)
    model.forward = torch.compile(model.forward, backend="aot_eager", fullgraph=True)
    assert peer_error(model, name) < 1e-3


def test_generate_gives_the_same_tokens_compiled() -> None:
    model = load_peer("llama-4-32-sym", dtype=torch.float32)
    assert model.hf_quantizer.is_compileable
    prompt = {"input_ids": ids(8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    plain = model.generate(**prompt, **options)
    model.forward = torch.compile(model.forward, backend="aot_eager")
    assert torch.equal(model.generate(**prompt, **options, cache_implementation="static"), plain)


def test_gradients_reach_the_input_and_no_packed_tensor() -> None:
    model = load_peer("llama-4-32-sym", dtype=torch.float32)
    assert model.hf_quantizer.is_trainable
    assert not any(p.requires_grad for m in model.modules() if isinstance(m, QuantLinear) for p in m.parameters())
    embedded = model.get_input_embeddings()(ids()).detach().requires_grad_()
    model(inputs_embeds=embedded).logits.square().mean().backward()
    assert embedded.grad is not None
    assert embedded.grad.abs().sum() > 0


def test_dequantizing_offloaded_layers_is_refused_and_changes_nothing(tmp_path: Path) -> None:
    device_map = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    device_map |= {"model.layers.0": "cpu", "model.layers.1": "disk"}
    model = load_peer("llama-4-32-sym", dtype=torch.float32, device_map=device_map, offload_folder=tmp_path)
    with pytest.raises(ConfigError, match="offloaded"):
        model.dequantize()
    assert peer_error(model, "llama-4-32-sym") < 1e-3
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
