"""All experts in one call: whoever patches or hooks the activation, or looks for operators, is heard."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers")
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from gptq_backend.kernels.cpu_experts import ExpertMLPs
from gptq_transformers.activations import gated_name_of, name_of
from gptq_transformers.experts.expert_list import ExpertList
from tests.kernels.checks import native
from tests.transformers.test_grouped_experts import rounded, routed
from tests.transformers.toy_experts import needs_fused

pytestmark = [native, needs_fused]


@pytest.fixture
def experts() -> ExpertList:
    return rounded()[1]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each call for all of it."""
    counted: list[int] = []
    original = ExpertMLPs.__call__
    monkeypatch.setattr(ExpertMLPs, "__call__", lambda *args: (counted.append(1), original(*args))[1])
    return counted


@torch.no_grad()
def check(experts: ExpertList) -> Tensor:
    """Both ways give the same; returns it."""
    y = experts(*routed())
    torch.testing.assert_close(y, experts._by_expert(*routed()), atol=1e-6, rtol=1e-5)
    return y


def patched_class(experts: Any, patch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    patch.setattr(type(experts.act_fn), "forward", change(type(experts.act_fn).forward))


def patched_gate(experts: Any, patch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    patch.setattr(experts.fused_class, "_apply_gate", change(experts.fused_class._apply_gate))


def patched_activation(experts: Any, patch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    patch.setattr(experts.act_fn, "forward", change(experts.act_fn.forward), raising=False)


def hooked(experts: Any, patch: pytest.MonkeyPatch, change: Callable[..., Any]) -> None:
    experts.act_fn.register_forward_hook(lambda module, args, y: change(lambda: y)())


@pytest.mark.parametrize("how", [patched_class, patched_gate, patched_activation, hooked])
def test_an_activation_that_is_patched_is_heard(experts: Any, how: Any, calls: list[int]) -> None:
    before = check(experts)
    assert len(calls) == 1
    with pytest.MonkeyPatch.context() as patch:
        how(experts, patch, lambda function: lambda *args: 2 * function(*args))
        assert not torch.allclose(check(experts), before)
    experts.act_fn._forward_hooks.clear()
    assert torch.equal(check(experts), before)
    assert len(calls) == 2


def test_settings_that_change_are_read(experts: Any, calls: list[int]) -> None:
    """As those of classes that clamp."""
    experts.fused_class = Clamping
    experts.limit = 1e6
    experts.ungroup()
    before = check(experts)
    assert len(calls) == 1
    experts.limit = 0.01
    assert not torch.allclose(check(experts), before)
    experts.act_fn = nn.GELU()
    check(experts)
    assert len(calls) == 1
    for other in (copy.deepcopy(experts), pickle.loads(pickle.dumps(experts))):
        torch.testing.assert_close(check(other), check(experts))


class Clamping(nn.Module):
    def _apply_gate(self: Any, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate).clamp(max=self.limit) * up


def test_an_activation_with_a_hook_is_not_called_to_see_what_it_is(experts: Any) -> None:
    experts.ungroup()
    seen: list[int] = []
    experts.act_fn.register_forward_hook(lambda module, args, y: seen.append(y.shape[-1]))
    check(experts)
    assert set(seen) == {48}


def test_a_hook_of_all_modules_hears_each_layer(experts: Any) -> None:
    seen: list[nn.Module] = []
    handle = nn.modules.module.register_module_forward_hook(lambda module, args, y: seen.append(module))
    with torch.no_grad():
        experts(*routed())
    handle.remove()
    assert experts.get_submodule("3.down_proj") in seen


class Operators(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen.add(str(func))
        return func(*args, **(kwargs or {}))


@torch.no_grad()
def test_traces_modes_and_functorch_see_operators(experts: Any) -> None:
    expected, (x, index, weights) = check(experts), routed()
    inputs = torch.randn_like(x), index, weights
    mapped = torch.vmap(lambda x: experts(x, index, weights))(torch.stack([inputs[0], x]))
    with Operators() as operators:
        torch.testing.assert_close(experts(x, index, weights), expected, atol=1e-6, rtol=1e-5)
    assert "gptq_backend.cpu_moe_gemm.default" in operators.seen
    for y in (
        mapped[1],
        torch.jit.trace(experts, inputs, check_trace=False)(x, index, weights),
        make_fx(lambda *args: experts(*args))(*inputs)(x, index, weights),
    ):
        torch.testing.assert_close(y, expected, atol=1e-6, rtol=1e-5)


def test_only_what_is_known_everywhere_has_a_name() -> None:
    silu = nn.functional.silu
    assert name_of(silu) == gated_name_of(lambda gate, up: up * silu(gate)) == "silu"
    assert name_of(lambda x: silu(x).clamp(max=200)) is None
    assert name_of(lambda x: silu(x.view(3, 7, -1))) is None
