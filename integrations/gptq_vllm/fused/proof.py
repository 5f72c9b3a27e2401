"""Whether a decoder layer in two calls gives what its own code gives."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .forward import install, remove
from .match import NoMatch, Parts

_TOKENS = 5  # more than a row, and no multiple of anything
_SCALE = 0.02  # of the input, beside which what attention and MLP add is large, as norms come before them
# Relative difference, of which vLLM's norms make a part: they round the sum that they normalize later than models of
# transformers and these calls do.
_LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


class _Attention(nn.Module):
    """In place of vLLM's, which needs a cache: something that depends on all of q, k and v."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        """q: [T, heads * dim]; k, v: [T, KV heads * dim] -> as q."""
        return q.tanh() + (k.tanh() + v).repeat(1, q.shape[-1] // v.shape[-1])


def prove(parts: Parts) -> None:
    """Compare the two on random inputs, as a first layer and as a later one.

    Raises:
        NoMatch: they differ.
    """
    layer = parts.layer
    dtype = next(each.dtype for each in layer.parameters() if each.is_floating_point() and each.numel())
    generator = torch.Generator().manual_seed(0)
    width = parts.tail.output.o.out_features
    x, residual = (_SCALE * torch.randn(2, _TOKENS, width, generator=generator)).to(dtype)
    with torch.no_grad(), _without_cache(layer.self_attn):
        wanted = _results(layer, x, residual)
        try:
            install(parts)
            found = _results(layer, x, residual)
        finally:
            remove(layer)
    for a, b in zip(wanted, found, strict=True):
        difference = float((a.float() - b.float()).norm() / a.float().norm())
        if not difference < _LIMITS.get(dtype, 0.0):
            raise NoMatch(f"it computes something else than the two calls (relative difference {difference:.1e})")


def _results(layer: Any, x: Tensor, residual: Tensor) -> list[Tensor]:
    positions = torch.arange(_TOKENS)
    # vLLM's norms may write to what they are given.
    return [y for given in (None, residual.clone()) for y in layer(positions, x.clone(), given)]


@contextmanager
def _without_cache(attention: Any) -> Iterator[None]:
    own = attention.attn
    attention.attn = _Attention()
    try:
        yield
    finally:
        attention.attn = own
