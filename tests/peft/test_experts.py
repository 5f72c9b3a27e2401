"""Gradients go through quantized experts to what lies before them: those of the dense weights, which nothing keeps."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from gptq_transformers.experts.expert_list import ExpertList
from tests.peft.training import EXPERTS
from tests.transformers.checkpoints import VERSION_4, dense, ids, load

if VERSION_4:
    pytest.skip("transformers 4 keeps experts apart, as layers like any other", allow_module_level=True)

FAMILY, SIZES, _ = EXPERTS
# In float32 the kernels compute with integers of 30 bits.
CLOSE = {torch.float64: 1e-9, torch.float32: 1e-5}


@pytest.fixture(params=[(4, False), (3, True)], ids=["4 bits", "3 bits, act-order"])
def folder(request: pytest.FixtureRequest, checkpoint: Callable[..., Path]) -> Path:
    bits, desc_act = request.param
    return checkpoint(FAMILY, bits, desc_act, **SIZES)


def gradients(base: Any, checkpointing: dict[str, Any] | None = None) -> dict[str, Tensor]:
    """Of an adapter on the queries of both layers, of the routers and of the embedding: all but one before experts."""
    torch.manual_seed(0)
    config = LoraConfig(r=4, target_modules=["q_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    model = get_peft_model(base, config).to(next(base.parameters()).dtype).train()
    for name, parameter in model.named_parameters():
        if name.endswith(("mlp.gate.weight", "embed_tokens.weight")):
            parameter.requires_grad_()
    if checkpointing is not None:
        base.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    model(input_ids=ids(), labels=ids()).loss.backward()
    return {name: each.grad for name, each in model.named_parameters() if each.requires_grad}


def check_equal(found: dict[str, Tensor], expected: dict[str, Tensor], tolerance: float) -> None:
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert float(gradient.norm()) > 0, name
        assert float((found[name] - gradient).norm() / gradient.norm()) < tolerance, name


@pytest.mark.parametrize("dtype", CLOSE, ids=str)
def test_gradients_are_those_of_the_dequantized_model(folder: Path, dtype: torch.dtype) -> None:
    check_equal(gradients(load(folder).to(dtype)), gradients(dense(load(folder)).to(dtype)), CLOSE[dtype])


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_no_gradient(folder: Path, reentrant: bool) -> None:
    expected = gradients(load(folder))
    check_equal(gradients(load(folder), {"use_reentrant": reentrant}), expected, 1e-5)


def test_the_backward_pass_holds_packed_weights_only(folder: Path) -> None:
    kept: list[Tensor] = []
    model = load(folder)
    layers = next(module for module in model.modules() if isinstance(module, ExpertList))
    x = torch.randn(24, 64, requires_grad=True)
    chosen, shares = torch.rand(24, 4).topk(2).indices, torch.rand(24, 2)
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layers(x, chosen, shares).sum().backward()
    assert kept
    weights = {tuple(each.shape) for each in dense(layers).parameters()}
    shapes = {tuple(each.shape) for each in kept if each.is_floating_point()}
    assert not shapes & (weights | {shape[::-1] for shape in weights})
    expected = x.grad
    x.grad = None
    dense(layers)(x, chosen, shares).sum().backward()
    torch.testing.assert_close(expected, x.grad, atol=1e-5, rtol=1e-5)


def test_a_router_learns_from_experts_in_a_single_call(folder: Path) -> None:
    """Nothing before it is trained, so that the products themselves need no gradient."""
    layers: Any = next(module for module in load(folder).modules() if isinstance(module, ExpertList))
    x, chosen, shares = torch.randn(24, 64), torch.rand(24, 4).topk(2).indices, torch.rand(24, 2).requires_grad_()
    found = []
    for experts in (layers, dense(layers)):
        experts(x, chosen, shares).square().sum().backward()
        found.append(shares.grad)
        shares.grad = None
    assert layers._grouped.serve(x)
    torch.testing.assert_close(*found, atol=1e-5, rtol=1e-5)


def test_experts_whose_forms_differ_have_gradients_too(checkpoint: Callable[..., Path]) -> None:
    """One of them is dense: all are multiplied one by one."""
    model = load(checkpoint(FAMILY, **SIZES))
    experts = next(module for module in model.modules() if isinstance(module, ExpertList))
    plain: nn.Module = experts.get_submodule("1.up_proj").dequantize().requires_grad_(False)
    experts.get_submodule("1").up_proj = plain
    twin = dense(model)
    check_equal(gradients(model), gradients(twin), 1e-5)
