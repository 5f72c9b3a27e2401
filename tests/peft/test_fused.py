"""Decoder layers that run in few calls: they step aside for an adapter, and come back when it is off or gone."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn

from gptq_transformers.fused import forward
from tests.kernels.checks import native
from tests.peft.training import train
from tests.transformers.checkpoints import distance, load, logits

pytestmark = native


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Which decoder layers ran in few calls."""
    found: list[int] = []
    run = forward.Calls.run

    def noted(self: forward.Calls, *args: object, **kwargs: object) -> Tensor:
        found.append(self.parts.attention.layer_idx)
        return run(self, *args, **kwargs)

    monkeypatch.setattr(forward.Calls, "run", noted)
    return found


def adapted(base: nn.Module, **options: object) -> PeftModel:
    config = {"r": 4, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM", "init_lora_weights": False, **options}
    return get_peft_model(base, LoraConfig(**config)).eval()


def exact(model: PeftModel) -> Tensor:
    """Of the same weights, all dense."""
    dense = copy.deepcopy(model)
    dense.base_model.model.dequantize()
    return logits(dense)


def test_an_adapter_is_heard_at_once_in_eval_and_in_training(checkpoint: Callable[..., Path], runs: list[int]) -> None:
    base = load(checkpoint())
    runs.clear()  # loading tries them
    logits(base)
    assert runs == [0, 1]
    runs.clear()
    model = adapted(base)
    assert distance(logits(model), exact(model)) < 1e-5
    train(model, steps=2)
    assert distance(logits(model), exact(model)) < 1e-5
    assert runs == []


def test_layers_without_an_adapter_go_on(checkpoint: Callable[..., Path], runs: list[int]) -> None:
    model = adapted(load(checkpoint()), layers_to_transform=[1])
    runs.clear()
    assert distance(logits(model), exact(model)) < 1e-5
    assert runs == [0]


def test_layers_come_back_while_adapters_are_off(checkpoint: Callable[..., Path], runs: list[int]) -> None:
    base = load(checkpoint())
    expected = logits(base)
    model = adapted(base, modules_to_save=["input_layernorm"])
    on = logits(model)
    runs.clear()
    for _ in range(2):
        with model.disable_adapter():
            assert torch.equal(logits(model), expected)
        assert torch.equal(logits(model), on)
    assert runs == [0, 1, 0, 1]


def test_layers_come_back_when_adapters_are_unloaded(checkpoint: Callable[..., Path], runs: list[int]) -> None:
    base = load(checkpoint())
    expected = logits(base)
    model = adapted(base)
    logits(model)
    runs.clear()
    assert torch.equal(logits(model.unload()), expected)
    assert runs == [0, 1]


def test_a_hook_on_an_adapter_is_called_although_it_is_off(checkpoint: Callable[..., Path], runs: list[int]) -> None:
    model, seen = adapted(load(checkpoint())), []
    runs.clear()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    layer.register_forward_hook(lambda *_: seen.append(True))
    with model.disable_adapter():
        logits(model)
    assert (seen, runs) == ([True], [1])


def test_a_copy_made_while_adapters_are_off_hears_them_later(checkpoint: Callable[..., Path]) -> None:
    model = adapted(load(checkpoint()))
    expected = logits(model)
    with model.disable_adapter():
        logits(model)
        other = copy.deepcopy(model)
        logits(other)
    other.base_model.enable_adapter_layers()
    assert torch.equal(logits(other), expected)


def test_merged_layers_are_right(checkpoint: Callable[..., Path]) -> None:
    model = adapted(load(checkpoint()))
    expected = logits(model)
    merged = model.merge_and_unload()
    assert distance(logits(merged), expected) < 1e-5
