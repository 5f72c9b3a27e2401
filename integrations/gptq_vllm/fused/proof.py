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
# Relative difference, of which vLLM's norms make a part: they round the sum that they normalize later than models of
# transformers and these calls do.
_LIMITS = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}


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
    dtype, width = parts.tail.output.o.weight.spec.scales_dtype, parts.tail.output.o.out_features
    dtype = next((p.dtype for p in parts.layer.parameters() if p.is_floating_point() and p.numel()), dtype)
    generator = torch.Generator().manual_seed(0)
    x, residual = (torch.randn(_TOKENS, width, generator=generator).to(dtype) for _ in range(2))
    positions = torch.arange(_TOKENS)
    results = []
    with torch.no_grad(), _without_cache(parts.attention):
        for fused in (False, True):
            if fused:
                install(parts)
            try:
                # vLLM's norms may write to what they are given.
                for each in (None, residual.clone()):
                    results.append(parts.layer(positions, x.clone(), each))
            finally:
                if fused:
                    remove(parts.layer)
    limit = _LIMITS.get(dtype, 0.0)
    for wanted, found in zip(results[:2], results[2:]):
        for a, b in zip(wanted, found, strict=True):
            difference = float((a.float() - b.float()).norm() / a.float().norm())
            if not difference < limit:
                raise NoMatch(f"it computes something else than the two calls (relative difference {difference:.1e})")


@contextmanager
def _without_cache(attention: Any) -> Iterator[None]:
    own = attention.attn
    attention.attn = _Attention()
    try:
        yield
    finally:
        attention.attn = own
