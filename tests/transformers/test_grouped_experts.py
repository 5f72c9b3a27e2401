"""Grouped products of experts: the same as each by itself, and the layers stay what they were."""

from __future__ import annotations

import copy
import gc
import threading
import time
import weakref
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("transformers")
from transformers import AutoModelForCausalLM, PreTrainedModel

import gptq_transformers
from gptq_backend import QuantizeConfig, QuantLinear
from gptq_backend.kernels.experts import Grouped
from gptq_transformers.experts.expert_list import ExpertList
from gptq_transformers.experts.grouped import GroupedExperts
from tests.transformers.toy_experts import build, expert_lists, needs_fused, quantized


def rounded(name: str = "qwen3_moe", **settings: Any) -> tuple[PreTrainedModel, ExpertList]:
    """A model in memory, rounded to nearest, and the experts of its last layer."""
    model = build(name, num_hidden_layers=1) if name != "nemotron_h" else build(name)
    settings = {"bits": 4, "group_size": 16, "sym": False, "quality": "fast", **settings}
    gptq_transformers.quantize(model, QuantizeConfig(**settings), None)
    return model, list(expert_lists(model).values())[-1]


def routed(tokens: int = 9) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    index = torch.randint(0, 5, (tokens, 2), generator=generator)  # 4: an expert that lives on another device
    return torch.randn(tokens, 64, generator=generator), index, torch.rand(tokens, 2, generator=generator)


@torch.no_grad()
def check_grouped(experts: ExpertList, grouped: bool = True) -> Tensor:
    """Both ways give the same; returns it."""
    x, index, weights = routed()
    y = experts(x, index, weights)
    assert experts._grouped.serve(x) is grouped
    torch.testing.assert_close(y, experts._by_expert(x, index, weights), atol=1e-6, rtol=1e-5)
    return y


@needs_fused
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "nemotron_h"])
def test_grouped_experts_compute_what_each_computes_alone(name: str) -> None:
    _, experts = rounded(name)
    assert experts.group() == []
    torch.testing.assert_close(check_grouped(copy.deepcopy(experts)), check_grouped(experts))
    with torch.no_grad():
        assert experts(*(tensor[:0] for tensor in routed())).shape == (0, 64)


@needs_fused
def test_a_stack_takes_the_place_of_the_layers_tensors(tmp_path: Path) -> None:
    quantized("qwen3_moe", tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    layers = [
        layer
        for layer in expert_lists(loaded)["model.layers.1.mlp.experts"].modules()
        if isinstance(layer, QuantLinear)
    ]
    for key in ("qweight", "scales"):
        tensors = [getattr(layer, key) for layer in layers]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        assert len(storages) == 2  # gate and up, down
        assert sum(storages.values()) == sum(tensor.nbytes for tensor in tensors)


@needs_fused
@pytest.mark.parametrize(
    ("rules", "grouped", "why"),
    [
        ({r".*down_proj": {"bits": 8}}, True, None),
        ({r".*gate_proj": {"group_size": 32}}, True, None),
        ({r".*experts\.1\.up_proj": {"bits": 8}}, True, "up_proj: they differ in bits: 4 and 8"),
        ({r".*experts\.2\.": {"group_size": 32}}, False, "down_proj: they differ in group_size"),
        ({r"-:.*experts\.0\.": {}}, False, "they are not all quantized"),
    ],
)
def test_what_cannot_be_grouped_is_multiplied_apart_and_it_is_said(
    rules: dict[str, Any], grouped: bool, why: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    _, experts = rounded(dynamic=rules)
    said = [record.getMessage() for record in caplog.records if "one by one" in record.getMessage()]
    assert len(said) == (why is not None)
    assert why is None or why in said[0]
    check_grouped(experts, grouped)


@needs_fused
def test_gradients_go_through_the_layers_own_operators() -> None:
    _, experts = rounded()
    x, index, weights = routed()
    experts.ungroup()
    with torch.inference_mode():
        check_grouped(experts)  # what is made here must not be an inference tensor
    x.requires_grad_()
    y = experts(x, index, weights)
    y.sum().backward()
    twin = copy.deepcopy(experts)
    for i in range(4):
        for name in ("gate_proj", "up_proj", "down_proj"):
            setattr(twin.get_submodule(str(i)), name, experts.get_submodule(f"{i}.{name}").dequantize())
    other = x.detach().clone().requires_grad_()
    twin(other, index, weights).sum().backward()
    torch.testing.assert_close(x.grad, other.grad, atol=1e-4, rtol=1e-4)
    with torch.no_grad():
        torch.testing.assert_close(experts(x, index, weights), y, atol=1e-6, rtol=1e-5)


@needs_fused
def test_layers_that_change_are_noticed() -> None:
    _, experts = rounded()
    before = check_grouped(experts)
    _, other = rounded(bits=8)
    experts.get_submodule("0").load_state_dict(experts.get_submodule("1").state_dict())
    changed = check_grouped(experts)
    assert not torch.equal(before, changed)
    experts.get_submodule("2").up_proj = other.get_submodule("2.up_proj")
    changed = check_grouped(experts)  # gate and down are grouped still
    experts.add_module("1", copy.deepcopy(experts.get_submodule("3")))
    assert not torch.equal(changed, check_grouped(experts))
    experts.get_submodule("2").up_proj = other.get_submodule("2.up_proj").dequantize()
    check_grouped(experts, grouped=False)


@needs_fused
def test_a_hook_on_an_expert_is_called() -> None:
    _, experts = rounded()
    seen = []
    handle = experts.get_submodule("3.gate_proj").register_forward_pre_hook(
        lambda module, args: seen.append(len(args[0]))
    )
    check_grouped(experts, grouped=False)
    assert seen == [int((routed()[1] == 3).sum())] * 2
    handle.remove()
    check_grouped(experts)


@needs_fused
def test_a_graph_holds_the_grouped_experts_unbroken() -> None:
    _, experts = rounded()
    expected = check_grouped(experts)
    compiled = torch.compile(experts, fullgraph=True, backend="eager")
    with torch.no_grad():
        torch.testing.assert_close(compiled(*routed()), expected, atol=1e-6, rtol=1e-5)
        assert compiled(*routed(3)).shape == (3, 64)


@needs_fused
def test_a_graph_is_not_run_with_layers_that_changed() -> None:
    _, experts = rounded()
    _, other = rounded(bits=8)
    compiled = torch.compile(experts, backend="eager")

    def check() -> None:
        with torch.no_grad():
            torch.testing.assert_close(compiled(*routed()), experts._by_expert(*routed()), atol=1e-6, rtol=1e-5)

    check()
    layer = experts.get_submodule("1.down_proj")
    layer.scales = torch.nn.Parameter(3 * layer.scales, requires_grad=False)
    check()
    experts.get_submodule("2").up_proj = other.get_submodule("2.up_proj").dequantize()
    check()
    experts.get_submodule("2").up_proj = other.get_submodule("2.up_proj")
    check()
    seen = []
    experts.get_submodule("3.gate_proj").register_forward_pre_hook(lambda module, args: seen.append(len(args[0])))
    check()
    assert len(seen) == 2  # compiled, and one by one


@needs_fused
def test_threads_that_call_experts_for_the_first_time_do_not_stack_them_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    _, experts = rounded()
    expected, together, made = check_grouped(experts), threading.Barrier(3), []

    def slow(modules: Any, *more: Any) -> GroupedExperts:
        made.append(modules)
        time.sleep(0.05)
        return GroupedExperts(modules, *more)

    def call(_: int) -> Tensor:
        together.wait()
        return check_grouped(experts)

    experts.ungroup()
    monkeypatch.setattr(gptq_transformers.experts.expert_list, "GroupedExperts", slow)
    with ThreadPoolExecutor(3) as threads:
        assert all(torch.equal(y, expected) for y in threads.map(call, range(3)))
    assert len(made) == 1


@needs_fused
def test_stacks_are_freed_with_the_quantized_layers() -> None:
    model, experts = rounded()
    ours = {parameter.data_ptr() for parameter in experts.parameters()}
    found = [found for found in gc.get_objects() if type(found) is Grouped and found.qweight.data_ptr() in ours]
    stacks = weakref.WeakSet(found)
    assert len(stacks) == 2
    del found
    expected = check_grouped(experts)
    model.dequantize()
    assert not stacks
    torch.testing.assert_close(check_grouped(experts, grouped=False), expected, atol=1e-6, rtol=1e-5)
