"""Experts of a mixture one by one, however its code calls them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from gptq_backend.model.mixtures import find_mixture


class Scaled(nn.Linear):
    def forward(self, hidden_states: Tensor, scale: float = 1) -> Tensor:  # type: ignore[override]
        return super().forward(hidden_states) * scale


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList([Scaled(4, 4), Scaled(4, 4)])

    def forward(self, x: Tensor) -> Tensor:
        return self.experts[0](x, scale=2) + self.experts[1](hidden_states=x, scale=3)


def test_what_replaces_an_expert_gets_its_tokens_whether_they_have_a_name_or_not() -> None:
    module, x = Sparse(), torch.randn(2, 4)
    expected, mixture = module(x), find_mixture(module)
    assert mixture is not None
    seen = []

    def instead(number: int, tokens: Tensor, call: object) -> Tensor:
        seen.append((number, tokens))
        return call(tokens)  # type: ignore[operator]

    with mixture.replaced(instead):
        assert torch.equal(module(x), expected)
    assert [number for number, _ in seen] == [0, 1]
    assert all(tokens is x for _, tokens in seen)
