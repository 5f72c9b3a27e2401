"""A model that accelerate has spread over devices keeps the hooks that carry activations between them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")
from accelerate import dispatch_model
from accelerate.hooks import AlignDevicesHook
from torch import nn
from transformers import AutoModelForCausalLM, GPTQConfig

from gptq_backend import ConfigError, QuantizeConfig, QuantLinear
from gptq_transformers import config as settings
from gptq_transformers import quantize
from gptq_transformers.quantize_on_load import quantize_loaded
from tests.transformers.checkpoints import VERSION_4, distance, ids, logits, tiny

WHOLE = {"": "cpu"}
LAYER_BY_LAYER = {
    "model.embed_tokens": "cpu",
    "model.rotary_emb": "cpu",
    "model.norm": "cpu",
    "lm_head": "cpu",
    "model.layers.0": "cpu",
    "model.layers.1.input_layernorm": "cpu",
    "model.layers.1.post_attention_layernorm": "cpu",
    "model.layers.1.self_attn": "cpu",
    "model.layers.1.mlp.gate_proj": "cpu",
    "model.layers.1.mlp.up_proj": "cpu",
    "model.layers.1.mlp.down_proj": "cpu",
    "model.layers.1.mlp.act_fn": "cpu",
}


def hooked(model: nn.Module) -> dict[str, Any]:
    return {name: module._hf_hook for name, module in model.named_modules() if hasattr(module, "_hf_hook")}


def samples() -> list[torch.Tensor]:
    return list(ids(32))


def on_the_fly(model: Any) -> None:
    quantize_loaded(model, settings.GPTQConfig(bits=4, group_size=32, dataset=samples()))


def by_call(model: Any) -> None:
    quantize(model, QuantizeConfig(group_size=32), samples())


@pytest.mark.parametrize("way", [on_the_fly, by_call])
@pytest.mark.parametrize("device_map", [WHOLE, LAYER_BY_LAYER])
def test_every_hook_is_where_it_was_and_still_called(way: Any, device_map: dict[str, str]) -> None:
    model = dispatch_model(tiny(), device_map, main_device="cpu", force_hooks=True)
    plain = tiny()
    before = hooked(model)
    assert "model.layers.1.mlp.down_proj" in before
    way(model)
    way(plain)
    assert hooked(model) == before
    assert sum(isinstance(module, QuantLinear) for module in model.modules()) == 14
    passed = set()

    class Seen(AlignDevicesHook):
        def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            passed.add(module)
            return super().pre_forward(module, *args, **kwargs)

    for hook in before.values():
        hook.__class__ = Seen
    assert distance(logits(model), logits(plain)) < 1e-5
    assert {name for name in before if model.get_submodule(name) not in passed} <= {"model.layers"}  # is not called


@pytest.mark.skipif(VERSION_4, reason="version 4 keeps experts apart")
def test_experts_that_are_split_keep_the_hook_of_their_module() -> None:
    model = dispatch_model(tiny("mixtral"), WHOLE, main_device="cpu", force_hooks=True)
    before = hooked(model)
    by_call(model)
    assert hooked(model) == before
    assert torch.isfinite(logits(model)).all()


def test_a_quantized_model_that_is_spread_can_be_cast_and_dequantized() -> None:
    model: Any = tiny()
    by_call(model)
    model = dispatch_model(model, LAYER_BY_LAYER, main_device="cpu", force_hooks=True)
    before = hooked(model)
    assert model.to(torch.bfloat16).dtype == torch.bfloat16
    model.dequantize()
    assert hooked(model) == before


def test_offloading_ends_with_the_run(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "model")
    device_map = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head"), "cpu")
    device_map |= {"model.layers.0": "disk", "model.layers.1": "cpu"}
    model = AutoModelForCausalLM.from_pretrained(
        tmp_path / "model", device_map=device_map, offload_folder=tmp_path / "off"
    )
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    by_call(model)
    by_call(plain)
    assert not hooked(model)
    # What was offloaded runs module by module, the other in few calls where that is possible.
    assert distance(logits(model), logits(plain)) < 1e-6


def test_one_device_to_compute_on_is_refused_for_a_model_on_several() -> None:
    model = tiny()
    model.hf_device_map = {"model.layers.0": 0, "model.layers.1": 1}
    with pytest.raises(ConfigError, match="device='cpu' is one place to compute.*leave device out"):
        quantize(model, QuantizeConfig(group_size=32), samples(), device="cpu")


def test_a_model_quantized_while_loading_over_a_device_map_works(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path)
    config = GPTQConfig(bits=4, group_size=32, dataset=[row.tolist() for row in samples()])
    spread = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config, device_map=LAYER_BY_LAYER)
    whole = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=config)
    assert torch.equal(logits(spread), logits(whole))
