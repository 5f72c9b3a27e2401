"""Moves, casts, reloads and shared memory: what they do to a prepared layer, also beside running forward passes."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_backend import CheckpointError, QuantLinear
from tests.format.test_stored_tensors import random_weight


def layer(seed: int = 0, backend: str | None = None, columns: int = 64) -> QuantLinear:
    weight = random_weight(4, columns, 32, 16, act_order=True, seed=seed)
    bias = torch.randn(32, generator=torch.Generator().manual_seed(seed))
    return QuantLinear.from_weight(weight, bias, name="model.q_proj", backend=backend)


@pytest.fixture
def repacked(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Which layers went back to the checkpoint's tensors."""
    found: list[str] = []
    original = QuantLinear.unprepare

    def unprepare(self: QuantLinear) -> QuantLinear:
        found.append(self.name)
        return original(self)

    monkeypatch.setattr(QuantLinear, "unprepare", unprepare)
    return found


def held(quantized: QuantLinear) -> dict[str, int]:
    return {name: parameter.data_ptr() for name, parameter in quantized.named_parameters()}


def test_a_state_dict_without_the_layers_tensors_leaves_it_prepared(repacked: list[str]) -> None:
    model = nn.ModuleDict({"q_proj": layer(), "adapter": nn.Linear(64, 4)})
    before = held(model["q_proj"])
    found = model.load_state_dict({"adapter.weight": torch.zeros(4, 64), "adapter.bias": torch.zeros(4)}, strict=False)
    assert sorted(found.missing_keys) == sorted(f"q_proj.{key}" for key in model["q_proj"].stored_spec.shapes)
    assert not found.unexpected_keys
    assert held(model["q_proj"]) == before
    assert model["q_proj"].kernel is not None
    assert not repacked
    assert torch.equal(model["adapter"].weight, torch.zeros(4, 64))


def test_a_state_dict_with_a_part_of_the_layer_is_loaded_as_by_any_module() -> None:
    quantized, other = layer(0), layer(1)
    found = quantized.load_state_dict({"bias": other.bias.data, "weight": torch.zeros(1)}, strict=False)
    assert sorted(found.missing_keys) == ["g_idx", "qweight", "qzeros", "scales"]
    assert found.unexpected_keys == ["weight"]
    assert torch.equal(quantized.bias, other.bias)
    x = torch.randn(2, 64)
    assert torch.allclose(quantized(x), layer(0)(x) - layer(0).bias + other.bias, atol=1e-4)


@pytest.mark.parametrize(
    "cast",
    [
        lambda m: m.half(),
        lambda m: m.to(torch.bfloat16),
        lambda m: m.double(),
        lambda m: m.to("cpu"),
        lambda m: m.to("cpu", torch.float16),
        lambda m: m.cpu(),
        lambda m: m.type(torch.float16),
    ],
)
def test_a_cast_touches_no_tensor_of_a_layer(cast: Callable[[nn.Module], nn.Module], repacked: list[str]) -> None:
    model = nn.Sequential(layer())
    before, changes, kernel = held(model[0]), model[0].changes, model[0].kernel
    cast(model)
    assert held(model[0]) == before
    assert (model[0].changes, model[0].kernel) == (changes, kernel)
    assert not repacked


@pytest.mark.parametrize("prepared", [True, False])
def test_an_emptied_layer_waits_for_a_state_dict(prepared: bool) -> None:
    model, state, x = nn.Sequential(layer()), layer(3).state_dict(), torch.randn(2, 64)
    if not prepared:
        model[0].unprepare()
    model.to_empty(device="cpu")
    assert {name: tuple(p.shape) for name, p in model[0].named_parameters()} == model[0].stored_spec.shapes
    assert model[0].kernel is None
    model[0].load_state_dict(state)
    assert torch.equal(model(x), layer(3)(x))


@pytest.mark.parametrize("prepared", [True, False])
def test_a_layer_moved_to_meta_is_empty_and_comes_back_by_to_empty(prepared: bool) -> None:
    model, state, x = nn.Sequential(layer()), layer(3).state_dict(), torch.randn(2, 64)
    if not prepared:
        model[0].unprepare()
    model.to("meta")
    assert all(parameter.is_meta for parameter in model.parameters())
    with pytest.raises(CheckpointError, match="never loaded"):
        model(x)
    model.to_empty(device="cpu")[0].load_state_dict(state)
    assert torch.equal(model(x), layer(3)(x))


@pytest.mark.parametrize("prepared", [True, False])
def test_shared_memory_holds_what_the_layer_computes_with(prepared: bool) -> None:
    model, x = nn.Sequential(layer()), torch.randn(2, 64)
    expected = model(x)
    if not prepared:
        model[0].unprepare()
    model.share_memory()
    assert all(parameter.is_shared() for parameter in model.parameters())
    assert (model[0].kernel is not None) == prepared
    assert torch.equal(model(x), expected)
    if prepared:
        before = held(model[0])
        model.share_memory()
        assert held(model[0]) == before


def test_a_bias_keeps_its_identity_and_gradient_through_casts() -> None:
    model = nn.Sequential(layer())
    bias = model[0].bias.requires_grad_()
    model(torch.randn(2, 64)).sum().backward()
    model.half().float()
    assert model[0].bias is bias
    assert bias.grad is not None


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("tensor", ["bias", "scales"])
def test_values_that_are_not_finite_are_refused(tensor: str, value: float) -> None:
    quantized = layer().unprepare()
    getattr(quantized, tensor).data.flatten()[-1] = value
    with pytest.raises(CheckpointError, match=rf"model\.q_proj\.{tensor}: 1 values are NaN or infinite"):
        quantized(torch.randn(1, 64))


CHANGES: dict[str, Callable[[nn.Module, dict[str, Tensor]], Any]] = {
    "half": lambda model, state: model.half().float(),
    "to(cpu)": lambda model, state: model.to("cpu", torch.bfloat16),
    "share_memory": lambda model, state: model.share_memory(),
    "share_memory and copy": lambda model, state: model.share_memory()._apply(torch.clone),
    "prepare and unprepare": lambda model, state: model[0].unprepare().prepare(),
    "load_state_dict": lambda model, state: model.load_state_dict(state),
    "load_state_dict(assign)": lambda model, state: model.load_state_dict(
        {k: v.clone() for k, v in state.items()}, assign=True
    ),
    "state_dict": lambda model, state: model.state_dict(),
}


def test_moving_a_layer_leaves_the_old_bias_to_calls_that_read_it() -> None:
    quantized = layer()
    bias = quantized.bias
    address = bias.data_ptr()
    quantized._apply(torch.clone)
    assert bias.data_ptr() == address != quantized.bias.data_ptr()
    trained = quantized.bias.requires_grad_()
    assert quantized._apply(torch.clone).bias is trained  # an optimizer may have it


@pytest.mark.parametrize("backend", [None, "reference"])
@pytest.mark.parametrize("change", CHANGES)
def test_threads_may_change_a_layer_while_others_call_and_save_it(change: str, backend: str | None) -> None:
    model, x = nn.Sequential(layer(backend=backend)), torch.randn(3, 64)
    expected = model(x)
    state = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    wrong: list[str] = []
    stop = threading.Event()

    def watch(look: Callable[[], None]) -> None:
        while not stop.is_set():
            try:
                look()
            except Exception as error:
                wrong.append(f"{type(error).__name__}: {error}")
                return

    def call() -> None:
        found = model(x)
        if not torch.equal(found, expected):
            wrong.append(f"another output: {found - expected}, then {torch.equal(model(x), expected)}")

    def save() -> None:
        found = model.state_dict()
        if found.keys() != state.keys() or not all(torch.equal(found[key], state[key]) for key in state):
            wrong.append(f"another state: {[(k, tuple(v.shape)) for k, v in found.items()]}")

    def ask() -> None:
        if model[0].weight.shape != (32, 64) or "kernel" not in repr(model):
            wrong.append("another weight")

    threads = [threading.Thread(target=watch, args=(look,)) for look in (call, call, save, ask)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(60):
            CHANGES[change](model, state)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert not wrong, wrong[:3]
