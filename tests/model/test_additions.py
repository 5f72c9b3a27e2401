"""Which tensor a layer's output is added to: found by trying, whatever things are called."""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor, nn

from gptq_backend.model.additions import BLOCK, Additions


class _Sequential(nn.Module):
    """As LLaMA's blocks: mixing, then MLP, both added."""

    def __init__(self) -> None:
        super().__init__()
        self.first_norm, self.second_norm = nn.LayerNorm(8), nn.LayerNorm(8)
        self.mix, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = x + self.mix(self.first_norm(x))
        return (x + self.down(self.up(self.second_norm(x)).relu()),)


class _Parallel(_Sequential):
    """As GPT-NeoX's: the sum of both branches is added."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (self.mix(self.first_norm(x)) + self.down(self.up(self.second_norm(x)).relu()) + x,)


class _Normed(_Sequential):
    """As Gemma 2's: what a branch returns is normalized before it is added."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        return (x + self.second_norm(self.mix(self.first_norm(x))),)


class _InPlace(_Sequential):
    """The addition overwrites a copy of what it adds to."""

    def forward(self, x: Tensor) -> tuple[Tensor]:
        x = x.clone()
        x += self.mix(self.first_norm(x))
        return (x,)


def _places(block: _Sequential, runs: int = 1) -> dict[str, str]:
    names = {module: name for name, module in block.named_modules()}
    additions = Additions(block, [module for module in block.modules() if isinstance(module, nn.Linear)])
    for _ in range(runs):
        x = torch.randn(2, 3, 8)
        output, trace = additions.trace(x, lambda x=x: block(x), lambda output: output[0])
        torch.testing.assert_close(output[0], block(x)[0], rtol=0, atol=0)
        assert additions.of is not None
        assert set(trace.places) == set(additions.of.values())
        assert {names[layer] for layer in trace.inputs} == {
            names[layer] for layer in additions.layers if layer in used(block)
        }
    return {names[layer]: place for layer, place in additions.of.items()}


def used(block: _Sequential) -> set[nn.Module]:
    """Layers that the block calls."""
    kinds = {_Normed: {block.mix}, _InPlace: {block.mix}}
    return kinds.get(type(block), {block.mix, block.up, block.down})


def test_sequential_blocks_add_to_their_input_and_to_what_the_second_norm_reads() -> None:
    assert _places(_Sequential(), runs=3) == {"mix": BLOCK, "down": "second_norm"}


def test_layers_whose_output_is_not_added_by_itself_add_to_nothing() -> None:
    assert _places(_Parallel(), runs=2) == {}
    assert _places(_Normed(), runs=2) == {}


def test_an_addition_in_place_to_a_copy_is_one_to_the_original() -> None:
    assert _places(_InPlace(), runs=2) == {"mix": BLOCK}


def test_tokens_that_are_not_finite_hide_nothing() -> None:
    block = _Sequential()
    additions = Additions(block, [block.mix, block.down])
    x = torch.randn(2, 3, 8)
    for spoilt in (x * math.nan, torch.cat([x, x[:1] * math.nan]), x):
        _, trace = additions.trace(spoilt, lambda x=spoilt: block(x), lambda output: output[0])
        if spoilt.isfinite().any():
            assert additions.of == {block.mix: BLOCK, block.down: "second_norm"}
            assert set(trace.places) == {BLOCK, "second_norm"}
        else:  # tells nothing; the next one is asked
            assert additions.of is None
            assert not trace.places


def test_hooks_are_gone_afterwards() -> None:
    block = _Sequential()
    before = copy.deepcopy({name: dict(module._forward_pre_hooks) for name, module in block.named_modules()})
    _places(block)
    assert {name: dict(module._forward_pre_hooks) for name, module in block.named_modules()} == before
