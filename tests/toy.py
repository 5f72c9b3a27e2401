"""A small decoder with everything that matters to calibration: shared inputs, experts, a tied head."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptq_backend import Events

WIDTH, VOCABULARY = 32, 48


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(WIDTH, WIDTH, bias=i == 0) for i in range(3))
        self.o = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.o(F.scaled_dot_product_attention(self.q(x), self.k(x), self.v(x), mask))


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(WIDTH, 40, bias=False) for _ in range(2))
        self.down = nn.Linear(40, WIDTH, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(F.silu(self.gate(x)) * self.up(x))


class SparseMlp(nn.Module):
    """Each token goes to its best expert; with ``unreachable`` the last one gets none."""

    def __init__(self, experts: int = 3, unreachable: bool = False) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, experts, bias=True)
        self.experts = nn.ModuleList(Mlp() for _ in range(experts))
        if unreachable:
            self.gate.bias.data[-1] = -1e4

    def forward(self, x: Tensor) -> Tensor:
        rows = x.flatten(0, -2)
        chosen = self.gate(rows).argmax(-1)
        out = torch.zeros_like(rows)
        for i, expert in enumerate(self.experts):
            tokens = (chosen == i).nonzero().flatten()
            if len(tokens):
                out[tokens] = expert(rows[tokens])
        return out.view_as(x)


class Block(nn.Module):
    def __init__(self, mlp: nn.Module, parallel: bool) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attn, self.mlp, self.parallel = Attention(), mlp, parallel

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        h = self.norm1(x)
        if self.parallel:
            return x + self.attn(h, mask) + self.mlp(h)
        x = x + self.attn(h, mask)
        return x + self.mlp(self.norm2(x))


class Toy(nn.Module):
    def __init__(self, blocks: int = 2, mlp: Any = Mlp, parallel: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.blocks = nn.ModuleList(Block(mlp(), parallel) for _ in range(blocks))
        self.norm = nn.LayerNorm(WIDTH)
        self.lm_head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        if tied:
            self.lm_head.weight = self.embed.weight

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        length, device = input_ids.shape[1], input_ids.device
        mask = torch.ones(length, length, dtype=torch.bool, device=device).tril()
        if attention_mask is not None:
            mask = mask & attention_mask.bool()[:, None] | torch.eye(length, dtype=torch.bool, device=device)
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, mask)
        return self.lm_head(self.norm(x))


def toy(seed: int = 0, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Toy:
    torch.manual_seed(seed)
    return Toy(**kwargs).to(dtype)


def samples(count: int = 4, length: int = 24, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(0, VOCABULARY, (length,), generator=generator) for _ in range(count)]


def listener(**methods: Callable[..., object]) -> Events:
    """Events that call ``methods``."""
    listener = Events()
    vars(listener).update(methods)
    return listener
