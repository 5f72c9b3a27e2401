"""Experts, grouped or not, meet their own tokens; no engine is started."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable

import pytest
import torch

pytest.importorskip("vllm")

from gptq_backend import QuantizedWeight
from gptq_backend.kernels import Grouped, cpu, reference
from gptq_backend.kernels import table as kernels
from gptq_backend.kernels.experts import Routing
from gptq_vllm.expert_activation import activate, supported
from gptq_vllm.expert_shards import FirstProduct
from gptq_vllm.experts import Experts
from gptq_vllm.fused_weight import QuantizedSegment
from gptq_vllm.pieces import DensePiece
from tests.format.test_weight import K, N, piece, weight

IDS = torch.tensor([[0, 2], [2, 1], [-1, 2], [1, -1]], dtype=torch.int32)  # -1: on another rank


def check(experts: Experts, dense: list[torch.Tensor]) -> None:
    """dense: [N, K] of each expert."""
    x = torch.randn(len(IDS), K)
    y = experts(x, Routing(IDS, 3), 2)
    for row, expert in enumerate(IDS.flatten().tolist()):
        expected = torch.zeros(y.shape[1]) if expert < 0 else dense[expert] @ x[row // 2]
        torch.testing.assert_close(y[row], expected, atol=1e-3, rtol=1e-4)


FORMS: dict[str, tuple[Callable[[int], QuantizedWeight], Callable[[int], QuantizedWeight], int]] = {
    "w1 and w3 alike": (lambda i: weight(4, sym=True), lambda i: weight(4, sym=True), 1),
    "w3 in other bits": (lambda i: weight(4), lambda i: weight(8), 2),
    "an order of its own for each": (lambda i: weight(3, act_order=True), lambda i: weight(3, act_order=True), 2),
}


@pytest.mark.parametrize("form", FORMS)
def test_experts_of_one_form_are_not_grouped_or_mixed_up(form: str) -> None:
    first, second, parts = FORMS[form]
    hubs = [(first(i), second(i)) for i in range(3)]
    experts = Experts([[piece(a), piece(b)] for a, b in hubs], torch.float32, None, "w1 and w3")
    assert experts.each is None
    assert len(experts.parts) == parts
    assert "grouped" in experts.describe()
    assert sum(parameter.nbytes for parameter in experts.parameters()) < 3 * 2 * K * N * 1.5
    check(experts, [torch.cat([a.dequantize(), b.dequantize()]) for a, b in hubs])


def test_experts_of_two_forms_are_grouped_or_it_is_not_said(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("vllm"), "propagate", True)
    hubs = [weight(4), weight(4), weight(8)]
    experts = Experts([[piece(hub)] for hub in hubs], torch.float32, None, "w2")
    assert experts.each is not None
    assert "one by one" in experts.describe()
    assert "differ in bits: 4 and 8" in caplog.text
    check(experts, [hub.dequantize() for hub in hubs])


def test_experts_apart_keep_the_row_that_only_grouped_ones_want(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose fastest row has no grouped product, as NVIDIA GPUs are."""
    fastest = dataclasses.replace(reference.KERNEL, name="fastest")
    grouped = dataclasses.replace(cpu.KERNEL, name="grouped")
    monkeypatch.setattr(kernels, "KERNELS", [fastest, grouped, reference.KERNEL])
    monkeypatch.setattr(kernels, "EXPERT_KERNELS", [dataclasses.replace(cpu.EXPERTS, kernel=grouped)])
    alike, apart = [weight(4), weight(4), weight(4)], [weight(4), weight(4), weight(8)]
    for hubs, row in ((alike, "grouped"), (apart, "fastest")):
        experts = Experts([[piece(hub)] for hub in hubs], torch.float32, None, "w2")
        served = {part.row.kernel.name for part in experts.modules() if isinstance(part, Grouped)}
        served |= {part.prepared.kernel.name for part in experts.modules() if isinstance(part, QuantizedSegment)}
        assert served == {row}
        check(experts, [hub.dequantize() for hub in hubs])


def test_a_dense_expert_is_lost() -> None:
    hubs, dense = [weight(4), weight(4)], torch.randn(N, K)
    experts = Experts([[piece(hubs[0])], [DensePiece(dense)], [piece(hubs[1])]], torch.float32, None, "down")
    assert experts.each is not None
    check(experts, [hubs[0].dequantize(), dense, hubs[1].dequantize()])


@pytest.mark.parametrize("halves", [False, True])
@pytest.mark.parametrize("alternating", [False, True])
@pytest.mark.parametrize("stored", [["w1", "w3"], ["w13"]])
def test_the_ranks_channels_of_gate_and_up_are_mixed_up(stored: list[str], alternating: bool, halves: bool) -> None:
    gate, up = torch.arange(6), torch.arange(6) + 100
    both = torch.stack([gate, up], -1).flatten() if alternating else torch.cat([gate, up])
    apart = both.chunk(2) if halves else (gate, up)
    layers = {"w1": apart[0], "w3": apart[1], "w13": both}
    for first in (0, 3):
        product = FirstProduct(True, alternating, 6, first, 3)
        found = torch.cat([layers[shard][product.rows(shard, halves)] for shard in stored])
        order = product.order(stored, halves)
        found = found if order is None else found[order]
        mine = [part[first : first + 3] for part in (gate, up)]
        assert torch.equal(found, torch.stack(mine, -1).flatten() if alternating else torch.cat(mine))


def test_no_activation_needs_an_operator_that_only_gpus_have() -> None:
    from gptq_vllm.compat import ApplyMoEActivationConfig, MoEActivation

    hidden = torch.randn(3, 8) * 5
    gate, up = hidden.chunk(2, -1)
    config = ApplyMoEActivationConfig(clamp_limit=2.0, alpha=1.5, beta=0.5)
    limited = gate.clamp(max=2), up.clamp(-2, 2)
    expected = {
        MoEActivation.SILU: torch.nn.functional.silu(limited[0]) * limited[1],
        MoEActivation.SWIGLUOAI_UNINTERLEAVE: limited[0] * torch.sigmoid(1.5 * limited[0]) * (limited[1] + 0.5),
    }
    for activation, value in expected.items():
        torch.testing.assert_close(activate(activation, hidden.clone(), config), value)
    assert not supported(MoEActivation.SITU)
