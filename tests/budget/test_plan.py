"""A budget is spent by what rounding does to the model's predictions."""

from __future__ import annotations

import dataclasses
import itertools
import re
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from gptq_backend import ConfigError, QuantizeConfig, quantize_model
from gptq_backend.budget import BudgetPlan, Goal, plan_budget
from gptq_backend.budget.sensitivity import Sensitivity, measure_sensitivity
from gptq_backend.model import Progress
from gptq_backend.pipeline import Events, RunOptions
from tests.toy import SparseMlp, Toy, listener, samples, toy

CONFIG = QuantizeConfig(group_size=32, quality="fast")


def wide(**kwargs: Any) -> Toy:
    """In float32, with weights large enough that rounding changes what is predicted."""
    model = toy(dtype=torch.float32, **kwargs)
    for parameter in model.parameters():
        parameter.data *= 1.5
    return model


def measure(model: Toy, config: QuantizeConfig = CONFIG) -> Sensitivity:
    data = samples(count=16)
    return measure_sensitivity(model, config, data, True, RunOptions(), Events(), Progress(None))


@torch.no_grad()
def divergence(model: Toy, original: Toy, data: list[Tensor]) -> float:
    ids = torch.stack(data)
    found, target = (each(ids).float().log_softmax(-1) for each in (model, original))
    return float(F.kl_div(found, target, reduction="sum", log_target=True)) / ids.numel()


def plan(model: Toy, goal: Goal, config: QuantizeConfig = CONFIG, **kwargs: Any) -> BudgetPlan:
    return plan_budget(model, config, samples(count=16), goal, **kwargs)


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_the_predicted_divergence_is_that_of_rounding_the_group_alone(bits: int) -> None:
    """By real runs that round nothing else, on the same text."""
    original = wide()
    for group in measure(original).groups:
        storage = next((each for each in group.costs if each.bits == bits), None)
        if storage is None:  # its 40 input channels make no whole groups of 32
            continue
        names = "|".join(re.escape(name) for name in group.layers)
        config = dataclasses.replace(CONFIG, bits=bits, dynamic={f"-:(?!({names})$)": {}})
        model = wide()
        quantize_model(model, config, samples(count=16))
        found = divergence(model, original, samples(count=16))
        assert group.costs[storage] == pytest.approx(found, rel=0.35), group.layers


def test_layers_that_read_the_same_input_are_stored_alike() -> None:
    names = [{name.removeprefix("blocks.0.") for name in group.layers} for group in measure(wide()).groups[:3]]
    assert names == [{"attn.q", "attn.k", "attn.v"}, {"attn.o"}, {"mlp.gate", "mlp.up"}]


def test_all_experts_of_a_block_are_stored_alike() -> None:
    found = measure(wide(mlp=lambda: SparseMlp(experts=3, unreachable=True)))
    experts = [group for group in found.groups if any("experts" in name for name in group.layers)]
    assert [len(group.layers) for group in experts] == [9, 9]


def test_measuring_leaves_the_model_as_it_was() -> None:
    model, before = wide(tied=True).train(), wide(tied=True)
    plan(model, Goal(nbytes=40_000))
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    state = before.state_dict()
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_more_bits_never_predict_more_divergence() -> None:
    model = wide()
    budgets = (3.1, 3.5, 4.6, 6.0, 9.0)
    found = [plan(model, Goal(layer_bits=bits)) for bits in budgets]
    assert all(a.divergence >= b.divergence for a, b in itertools.pairwise(found))
    assert all(each.layer_bits <= bits for each, bits in zip(found, budgets, strict=True))


def test_an_unreachable_budget_is_refused_with_the_least_that_can_be() -> None:
    model = wide()
    with pytest.raises(ConfigError, match=r"take (\d+\.\d+) bits at least; ask for more") as error:
        plan(model, Goal(layer_bits=2.0))
    least = float(str(error.value).split("take ")[1].split(" ")[0])
    assert plan(model, Goal(layer_bits=least)).layer_bits == pytest.approx(least, abs=0.001)
    with pytest.raises(ConfigError, match=r"take (\d+) bytes at least; ask for more") as error:
        plan(model, Goal(nbytes=1000))
    nbytes = int(str(error.value).split("files take ")[1].split(" ")[0])
    assert plan(model, Goal(nbytes=nbytes)).nbytes <= nbytes


def test_layers_with_rules_of_their_own_keep_them() -> None:
    config = dataclasses.replace(CONFIG, dynamic={".*attn.o": {"bits": 8}, "-:.*\\.1\\.mlp": {}})
    found = plan(wide(), Goal(layer_bits=3.5), config).config
    assert found.for_module("blocks.0.attn.o").bits == 8  # type: ignore[union-attr]
    assert found.for_module("blocks.1.mlp.up") is None
    chosen = plan(wide(), Goal(layer_bits=3.5), config)
    assert not any("attn.o" in name for group in chosen.groups for name in group.layers)


def test_a_budget_without_text_or_predictions_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes calibration text"):
        plan_budget(wide(), CONFIG, None, Goal(layer_bits=4.0))

    class Mute(Toy):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return (super().forward(input_ids, attention_mask),)

    with pytest.raises(ConfigError, match="Mute predicts nothing"):
        plan(Mute(), Goal(layer_bits=4.0))

    class Number(Toy):
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return super().forward(input_ids, attention_mask)[..., :1]

    with pytest.raises(ConfigError, match="Number predicts nothing"):
        plan(Number(), Goal(layer_bits=4.0))


def test_a_model_without_derivatives_or_with_nan_is_refused_and_left_as_it_was() -> None:
    class Closed(Toy):
        @torch.no_grad()
        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Any:
            return super().forward(input_ids, attention_mask)

    with pytest.raises(ConfigError, match="Closed takes none"):
        plan(Closed(), Goal(layer_bits=4.0))
    model = wide()
    model.lm_head.weight.data[0] = torch.nan
    with pytest.raises(ConfigError, match="not finite"):
        plan(model, Goal(layer_bits=4.0))
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_what_was_measured_is_kept_for_the_same_run(tmp_path: Any) -> None:
    steps: list[int] = []
    told: list[BudgetPlan] = []
    events = listener(sensitivity_step=lambda done, total: steps.append(total - done), budget_planned=told.append)
    for _ in range(2):
        plan(wide(), Goal(nbytes=50_000), events=events, progress=Progress(tmp_path / "out.progress"))
    assert steps == [*reversed(range(18))]  # 2 blocks, 16 windows, once
    assert told[0] == told[1]
    plan(wide(), Goal(nbytes=52_000), events=events, progress=Progress(tmp_path / "out.progress"))
    assert len(steps) == 18
    other = dataclasses.replace(CONFIG, sym=False)
    plan(wide(), Goal(nbytes=50_000), other, events=events, progress=Progress(tmp_path / "out.progress"))
    assert len(steps) == 36


def test_what_was_measured_is_not_taken_for_other_blocks(tmp_path: Any) -> None:
    """Whose layers have other names, or were not measured at all."""

    class Halves(Toy):
        def __init__(self) -> None:
            super().__init__()
            self.more = torch.nn.ModuleList([self.blocks[1]])
            self.blocks = self.blocks[:1]

        def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
            mask = torch.ones(input_ids.shape[1], input_ids.shape[1], dtype=torch.bool).tril()
            x = self.embed(input_ids)
            for block in (*self.blocks, *self.more):
                x = block(x, mask)
            return self.lm_head(self.norm(x))

    torch.manual_seed(0)
    for names in (["blocks"], ["more"], ["blocks", "more"]):
        options, progress = RunOptions(block_name=names), Progress(tmp_path / "out.progress")
        found = plan(Halves(), Goal(layer_bits=4.0), options=options, progress=progress)
        assert {name.split(".")[0] for group in found.groups for name in group.layers} == set(names)
