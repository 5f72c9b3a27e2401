"""Layers rounded together: the codes that each would get alone, and never those of another input."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_backend import CalibrationError, QuantizeConfig, quantize_model
from gptq_backend.algorithm.gptq import prepare_factor, quantize_weight, round_weights
from gptq_backend.model import joint_rounding
from tests.algorithm.test_gptq import ORDERS, assert_identical, layer
from tests.toy import WIDTH, SparseMlp, samples, toy

FAST = QuantizeConfig(group_size=16, quality="fast")


@pytest.fixture
def stacks(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Rows of the layers of every stack; they are made on the CPU too."""
    made: list[list[int]] = []

    def recorded(weights: list[Tensor], *args: Any) -> Any:
        made.append([len(weight) for weight in weights])
        return round_weights(weights, *args)

    monkeypatch.setattr(joint_rounding, "round_weights", recorded)
    monkeypatch.setattr(joint_rounding, "_worth_it", lambda weight: True)
    return made


@pytest.mark.parametrize("order", ORDERS)
def test_a_stack_gets_the_codes_of_its_layers(order: str) -> None:
    config = QuantizeConfig(bits=3, sym=False, group_size=24, quality="fast", **ORDERS[order])
    first, hessian = layer(seed=1)
    weights = [first, layer(seed=2, outputs=7)[0], layer(seed=3, outputs=33)[0]]
    shared = prepare_factor(hessian, config)
    for weight, rounded in zip(weights, round_weights(weights, shared, config)):
        expected = quantize_weight(weight, shared, config)
        assert_identical(rounded, expected.weight)
        again = quantize_weight(weight, shared, config, rounded=rounded)
        assert (again.loss, again.relative_loss) == (expected.loss, expected.relative_loss)


@pytest.mark.parametrize("true_sequential", [True, False])
def test_from_the_second_block_on_what_shared_an_input_is_stacked(stacks: list, true_sequential: bool) -> None:
    config = QuantizeConfig(group_size=16, quality="fast", true_sequential=true_sequential)
    model, alone = toy(blocks=3), toy(blocks=3)
    report = quantize_model(model, config, samples())
    assert stacks == [[32, 32, 32], [40, 40]] * 2  # q, k, v; gate, up
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_rounding, "_worth_it", lambda weight: False)
        before = quantize_model(alone, config, samples())
    assert [(e.name, e.loss) for e in report.layers] == [(e.name, pytest.approx(e.loss)) for e in before.layers]
    for name, tensor in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_block_that_differs_from_the_one_before_is_not_stacked_wrongly(stacks: list) -> None:
    """All read one input in the first block, attention and MLP two in the second."""
    model, alone = toy(), toy()
    for each in (model, alone):
        each.blocks[0].parallel = True
    settings = dataclasses.replace(FAST, token_weights=False)  # else the MLP's Hessian is another
    quantize_model(model, settings, samples())
    assert stacks == [[32, 32, 32, 40, 40]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joint_rounding, "_worth_it", lambda weight: False)
        quantize_model(alone, settings, samples())
    for name, tensor in alone.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_layers_of_other_settings_are_left_out(stacks: list) -> None:
    rules = {r".*blocks\.1\..*\.k": {"bits": 8}, r"-:.*blocks\.1\..*\.up": {}}
    quantize_model(toy(), QuantizeConfig(group_size=16, quality="fast", dynamic=rules), samples())
    assert stacks == [[32, 32]]


def test_experts_and_a_head_are_no_trouble(stacks: list) -> None:
    model = toy(mlp=SparseMlp)
    quantize_model(model, QuantizeConfig(group_size=16, quality="fast", lm_head=True), samples())
    assert stacks[0] == [32, 32, 32]


def test_a_damaged_weight_inside_a_stack_is_named(stacks: list) -> None:
    model = toy()
    model.blocks[1].attn.v.weight.data[3, 4] = float("nan")
    with pytest.raises(CalibrationError, match=r"blocks\.1\.attn\.v\.weight"):
        quantize_model(model, FAST, samples())


def test_nothing_is_stacked_on_a_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(joint_rounding, "round_weights", lambda *_: pytest.fail("stacked"))
    quantize_model(toy(), FAST, samples())


class AddsTwice(nn.Module):
    """Both of its layers read one input, and add to different tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.between = nn.LayerNorm(WIDTH), nn.Identity()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.back = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm(x)
        x = self.between(x + self.first(h))
        return x + self.back(self.second(h))


def test_what_makes_up_for_the_drift_of_its_own_sum_is_not_stacked(stacks: list) -> None:
    config = QuantizeConfig(group_size=16, quality="fast", correct_drift=True)
    models = [toy(blocks=3), toy(blocks=3)]
    for i, model in enumerate(models):
        torch.manual_seed(1)
        model.blocks = nn.ModuleList(AddsTwice() for _ in range(3)).to(torch.float64)
        with pytest.MonkeyPatch.context() as patch:
            if i:
                patch.setattr(joint_rounding, "_worth_it", lambda weight: False)
            quantize_model(model, config, samples())
    for name, tensor in models[1].state_dict().items():
        assert torch.equal(models[0].state_dict()[name], tensor), name
