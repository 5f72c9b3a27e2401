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
        drifts = Drifts(hooks, lambda: 0, lambda tensor: tensor)
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
        batches = [torch.randn(20, 8) for _ in range(2)]
        source = factors.of(target, [LayerInput(i, x, None, None, original=x + 0.1) for i, x in enumerate(batches)])
        assert source is not None
        assert source.drift is not None
        return weakref.ref(source.drift.sums)

    first, second = drift(), drift()
    assert first() is None
    assert second() is not None


def test_of_one_batch_nothing_is_made_up_for() -> None:
    """There is no other one to confirm it."""
    factors, target = Factors(Placement(), Team()), Target("b.layer", nn.Linear(8, 8), QuantizeConfig(group_size=8))
    x, weight = torch.randn(20, 8), torch.randn(8, 8)
    source = factors.of(target, [LayerInput(0, x, None, None, original=x + 0.1)])
    assert source is not None
    assert source.aim(weight) is weight


def test_what_layers_share_is_put_aside_once() -> None:
    """As on a GPU, where it waits in host memory."""

    class Pair(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.left, self.right = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x: Tensor) -> Tensor:
            normed = x.tanh()
            return x + self.left(normed) * self.right(normed)

    module, x, aside = Pair(), torch.randn(2, 3, 8), []

    def put(tensor: Tensor) -> Tensor:
        aside.append(tensor)
        return tensor.clone()

    targets = tuple(Target(f"b.{name}", layer, QuantizeConfig()) for name, layer in module.named_children())
    block = Block("b", module, targets)
    with torch.no_grad(), ExitStack() as hooks:
        drifts = Drifts(hooks, lambda: 0, put)
        drifts.original(block, 0, x, lambda: module(x))
        left, right = (drifts.of(layer, 0)[0] for layer in module.children())
    assert len(aside) == 1
    assert left is right
    assert left is not None
    assert torch.equal(left, x.tanh())
