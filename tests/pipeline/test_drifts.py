"""What is compared between the original blocks and the quantized ones is the same place, at the same time."""

from __future__ import annotations

import weakref
from contextlib import ExitStack

import torch
from torch import Tensor, nn

from gptq_backend import QuantizeConfig
from gptq_backend.distributed import Team
from gptq_backend.model.layer_inputs import Factors, LayerInput
from gptq_backend.model.placement import Placement
from gptq_backend.model.structure import Block, Target
from gptq_backend.pipeline.drifts import Drifts


class NormTwice(nn.Module):
    """Its last layer adds to what came to ``norm`` first."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return x + self.last(self.norm(self.norm(x)))


def test_of_a_module_that_is_called_twice_the_first_input_counts_in_both() -> None:
    torch.manual_seed(0)
    module, x = NormTwice(), torch.randn(2, 3, 8)
    config = QuantizeConfig()
    targets = (Target("b.first", module.first, config), Target("b.last", module.last, config))
    block = Block("b", module, targets)
    with torch.no_grad(), ExitStack() as hooks:
        drifts = Drifts(hooks, lambda: 0)
        drifts.original(block, 0, x, lambda: module(x))
        drifts.enter(block, 0, x)
        module(x)  # nothing is quantized: all is as it was there
        original, residual = drifts.of(module.last, 0)
        assert residual is not None
        assert original is not None
        there, here = residual
        assert torch.equal(there, x + module.first(x))
        assert torch.equal(here, there)


def test_the_drift_of_an_input_is_forgotten_with_the_input() -> None:
    factors, target = Factors(Placement(), Team()), Target("b.layer", nn.Linear(8, 8), QuantizeConfig(group_size=8))

    def drift() -> weakref.ref[Tensor]:
        x = torch.randn(20, 8)
        source = factors.of(target, [LayerInput(0, x, None, None, original=x + 0.1)])
        assert source is not None
        assert source.of_input is not None
        return weakref.ref(source.of_input)

    first, second = drift(), drift()
    assert first() is None
    assert second() is not None
