"""The calls that compute a decoder layer: projections, cache, attention, and all that follows."""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gptq_backend.kernels import cpu_attention, cpu_block, cpu_layers, cpu_tail

from .cache import append
from .held import Entry, Held, entries_of_dense, entries_of_packed
from .match import SINKS, Mixture, NoMatch, Parts, linear_of, norm_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_MOST_ROWS = math.inf if cpu_attention.serves_prompts() else cpu_attention.FEW_ROWS  # of queries, for our attention


class Calls:
    """The fused calls of a layer. They hold addresses; whoever uses them asks first whether these are outdated."""

    def __init__(self, parts: Parts, pairs: str | None) -> None:
        self.parts, self.pairs, attention = parts, pairs, parts.attention
        self._heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
        self._head_dim, self._width = attention.head_dim, parts.inputs[0].in_features
        self._sinks = _sinks_of(attention, self._heads[0])
        self._softcap = getattr(attention, "attn_logit_softcapping", None) or 0.0
        more = [tensor for linear in parts.linears for tensor in linear.parameters(recurse=False)]
        self.held = Held(_entries(parts), more)
        self._projections = cpu_block.Projections(norm_of(parts.norms[0]), [linear_of(each) for each in parts.inputs])
        tail = parts.tail()
        self._output = cpu_block.Output(parts.output()) if parts.known_mlp is None else None
        self._tail = None if tail is None else cpu_tail.Tail(tail)
        self._experts = None if parts.mixture is None else parts.mixture.experts.grouped
        self._layer: tuple[tuple[float, float], cpu_layers.Layer] | None = None
        norms = [norm_of(norm) for norm in parts.head_norms]
        self._kept = norms
        self._head_norms = [
            (None, True) if norm is None else (norm.native, norm.weight.numel() == self._head_dim)  # type: ignore[union-attr]
            for norm in norms
        ]

    def outdated(self) -> bool:
        return self.held.outdated()

    @property
    def index(self) -> int:
        """Of the layer in a cache."""
        return self.parts.attention.layer_idx

    def fit(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the shapes are those that are read; the layer's own code says what is wrong with others."""
        if x.dim() != 3 or x.shape[2] != self._width or x.numel() == 0:
            return False
        if self.pairs is None:
            return True
        angles: Any = kwargs.get("position_embeddings")
        return _served_angles(angles, x) and self._turns_by(angles[0])

    def _turns_by(self, cos: Tensor) -> bool:
        """Whether a head has as many channels as turn."""
        return self.pairs is None or cpu_attention.channels(self.pairs, cos.shape[2]) <= self._head_dim

    def run(
        self,
        hidden_states: Tensor,
        position_embeddings: Any = None,
        attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        cache_position: Tensor | None = None,
        **kwargs: Any,
    ) -> Tensor:
        """hidden_states: float [B, T, H] -> [B, T, H]."""
        q, keys, values = self._project(hidden_states, position_embeddings)
        keys, values = keys.transpose(1, 2), values.transpose(1, 2)
        if past_key_values is not None:
            extra = () if cache_position is None else ({"cache_position": cache_position},)
            keys, values = append(past_key_values, keys, values, self.parts.attention.layer_idx, *extra)
        attended = self._attend(q, keys, values, attention_mask, kwargs)
        return self.finish(attended, hidden_states)

    def finish(self, attended: Tensor, residual: Tensor) -> Tensor:
        """All that follows the attention. attended: [B, T, heads * D]; residual: [B, T, H] -> [B, T, H]."""
        if self._tail is not None and self._in_one_call(residual):
            y, chosen = self._tail.with_choice(attended, residual)
            if self.stands(chosen):
                return y
        return self.finish_by_modules(attended, residual)

    def _in_one_call(self, x: Tensor) -> bool:
        """Whether the call for all that follows the attention serves rows like these."""
        mixture, tail = self.parts.mixture, self._tail
        if tail is None or mixture is None:
            return tail is not None
        return x.dtype is mixture.dtype and tail.most_rows is not None and x[..., 0].numel() <= tail.most_rows

    def stands(self, chosen: Tensor) -> bool:
        """Whether a result that these experts had a part in is theirs, int32 [rows, k]: nobody touched one of them."""
        return not chosen.numel() or self._experts.untouched(set(chosen.flatten().tolist()))  # type: ignore[union-attr]

    def finish_by_modules(self, attended: Tensor, residual: Tensor) -> Tensor:
        """The same, for which the MLP or mixture is called as it is."""
        parts = self.parts
        h, n = self._output(attended, residual)  # type: ignore[misc]
        y = parts.mlp(n)
        if isinstance(y, tuple):  # with the logits of a router
            y = y[0]
        if parts.norms[3] is not None:
            y = parts.norms[3](y)
        return torch.add(h, y, alpha=parts.factor)

    def _project(self, x: Tensor, angles: Any) -> list[Tensor]:
        """q, k and v: [B, T, heads, D]."""
        found = self._projections(x)
        if len(found) == 1:
            widths = [heads * self._head_dim for heads in (*self._heads, self._heads[1])]
            found = [part.contiguous() for part in found[0].split(widths, dim=-1)]
        cos, sin = angles if self.pairs else (None, None)
        for part, heads, (native, per_head) in zip(found, self._heads, self._head_norms):
            if native is not None and not per_head:
                cpu_attention.rotate_(part, 1, norm=native)
                native = None
            cpu_attention.rotate_(part, heads, cos, sin, native, self.pairs or "halves")
        return [part.unflatten(-1, (-1, self._head_dim)) for part in found]

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        """q: [B, T, heads, D]; keys, values: [B, KV, S, D] -> [B, T, heads * D]."""
        attention = self.parts.attention
        function, ours, softcap = self._attention()
        if ours and q.shape[1] <= _MOST_ROWS and _served_cache(q, keys, values):
            batch, rows, *_ = q.shape
            causal = mask is None and rows == keys.shape[2] and function is sdpa_attention_forward
            if (causal and _is_causal(attention, kwargs)) or _served_mask(mask, q, batch, rows, keys.shape[2]):
                return cpu_attention.attend(q, keys, values, mask, attention.scaling, softcap, self._sinks)
        if hasattr(attention, "sliding_window"):
            kwargs["sliding_window"] = attention.sliding_window
        if self._softcap:
            kwargs["softcap"] = self._softcap
        if self._sinks is not None:
            kwargs["s_aux"] = self._sinks
        out, _ = function(
            attention, q.transpose(1, 2), keys, values, mask, dropout=0.0, scaling=attention.scaling, **kwargs
        )
        return out.reshape(*out.shape[:2], -1)

    def _attention(self) -> tuple[Any, bool, float]:
        """transformers' function, whether ours can take its place, and the cap of scores that it applies."""
        attention = self.parts.attention
        eager = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation, eager)
        ours = function is eager or (function is sdpa_attention_forward and self._sinks is None)
        return function, ours, self._softcap * (function is eager)  # transformers' other functions leave the cap out

    def begin(self, x: Tensor, given: tuple[Any, ...], length: int) -> Beginning | None:
        """What layers that run in one call with this one must have in common; None where there can be none.

        Args:
            length: positions in the cache.
        """
        mask, angles, _ = given
        batch, rows, _ = x.shape
        _, ours, softcap = self._attention()
        if not ours or rows > cpu_attention.FEW_ROWS or not _served_mask(mask, x, batch, rows, length + rows):
            return None
        return Beginning(self, softcap, angles if _served_angles(angles, x) else None, x)

    def joined(self, beginning: Beginning) -> cpu_layers.Layer | None:
        """The whole layer for one call, if it can be run with the one that begins."""
        attention, first = self.parts.attention, beginning.first
        if self._tail is None or self._sinks is not None or not self._in_one_call(beginning.x):
            return None
        same = attention.config is first.parts.attention.config and type(attention) is type(first.parts.attention)
        if not same or self._width != first._width or self._head_dim != first._head_dim or self.outdated():
            return None
        if self.pairs is not None and (beginning.angles is None or not self._turns_by(beginning.angles[0])):
            return None
        key = attention.scaling, beginning.softcap
        if self._layer is None or self._layer[0] != key:
            norms = [native for native, _ in self._head_norms]
            layer = cpu_layers.Layer(
                self._projections, norms, self.pairs, *self._heads, self._head_dim, *key, tail=self._tail
            )
            self._layer = key, layer
        return self._layer[1]

    def typical_score(self, x: Tensor, kwargs: dict[str, Any]) -> float:
        """Root mean square of the products of queries and keys, before they are scaled."""
        q, k, _ = self._project(x, kwargs.get("position_embeddings"))
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        return float((q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).square().mean().sqrt())


@dataclass(frozen=True)
class Beginning:
    """What the first of several layers knows.

    Args:
        softcap: of scores.
        angles: cos and sin, where they can be read.
        x: [B, T, H], what it is called with.
    """

    first: Calls
    softcap: float
    angles: Any
    x: Tensor

    @property
    def kind(self) -> tuple[Any, ...]:
        """All that it depends on which layers can follow, but for the layers."""
        turning = None if self.angles is None else self.angles[0].shape[2]
        return id(self.first), self.softcap, turning, self.x.dtype, self.x.shape


def _sinks_of(attention: Any, heads: int) -> Tensor | None:
    sinks = attention._parameters.get(SINKS)
    if sinks is not None and (sinks.shape != (heads,) or sinks.dtype not in DTYPES or not sinks.is_contiguous()):
        raise NoMatch(f"its sinks are {sinks.dtype} {tuple(sinks.shape)} with strides {sinks.stride()}")
    return sinks


def _entries(parts: Parts) -> list[Entry]:
    """Where the parameters lie whose addresses the calls hold."""
    found = [entry for linear in parts.linears for entry in entries_of_packed(linear)]
    found.append((parts.attention._parameters, SINKS, parts.attention._parameters.get(SINKS)))
    for norm in (*parts.norms, *parts.head_norms):
        if norm is not None:
            found += entries_of_dense(norm)
    return found if parts.mixture is None else [*found, *_of_mixture(parts.mixture)]


def _of_mixture(mixture: Mixture) -> list[Entry]:
    """Likewise of the router, and which stacks the experts' layers are part of."""
    held = [
        (module._parameters if name in module._parameters else module._buffers, name) for module, name in mixture.places
    ]
    experts = vars(mixture.experts)
    return [*((tensors, name, tensors.get(name)) for tensors, name in held), (experts, "_grouped", experts["_grouped"])]


def _served_angles(angles: Any, x: Tensor) -> bool:
    if type(angles) is not tuple or len(angles) != 2:
        return False
    cos, sin = angles
    if type(cos) is not Tensor or type(sin) is not Tensor or cos.dtype not in DTYPES or cos.dtype is not sin.dtype:
        return False
    shape = cos.shape
    if len(shape) != 3 or sin.shape != shape or not (cos.is_cpu and sin.is_cpu):
        return False
    return shape[0] in (1, x.shape[0]) and shape[1] == x.shape[1] and cos.is_contiguous() and sin.is_contiguous()


def _served_cache(q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether our attention reads the cache."""
    if type(keys) is not Tensor or type(values) is not Tensor or not (keys.is_cpu and values.is_cpu):
        return False
    if keys.stride(-1) != 1 or values.stride(-1) != 1 or not keys.dtype == values.dtype == q.dtype:
        return False
    batch, _, heads, head_dim = q.shape
    if keys.shape != values.shape or keys.shape[0] != batch or keys.shape[3] != head_dim or heads % keys.shape[1]:
        return False
    return head_dim <= cpu_attention.MAX_HEAD


def _is_causal(attention: Any, kwargs: dict[str, Any]) -> bool:
    """Whether transformers' function lets a row see what is before it where there is no mask."""
    asked = kwargs.get("is_causal")
    return kwargs.get("position_bias") is None and (getattr(attention, "is_causal", True) if asked is None else asked)


def _served_mask(mask: Any, x: Tensor, batch: int, rows: int, length: int) -> bool:
    """Whether our attention reads the mask, and knows what is meant where there is none."""
    if mask is None:
        return rows == 1
    return (
        type(mask) is Tensor
        and mask.is_cpu
        and mask.dtype in (torch.bool, x.dtype)
        and mask.dim() == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] == 1
        and mask.shape[2] in (1, rows)
        and mask.shape[3] >= length
        and mask.stride(3) == 1
    )
