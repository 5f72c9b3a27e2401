"""The forward pass of a decoder layer in few calls: projections, cache, attention, and all that follows."""

from __future__ import annotations

import inspect
import sys
from operator import is_
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gptq_backend.kernels import cpu_block

from .cache import append
from .match import Parts, linear_of, norm_of
from .watch import Watch

_FEW_ROWS = 8  # of queries, up to which our attention is faster than torch's
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A layer that is asked for more serves as it always did.
_KNOWN = frozenset(
    ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings", "cache_position",
     "output_attentions", "output_hidden_states")
)  # fmt: skip


class Calls:
    """The fused calls of a layer. They hold addresses; whoever uses them asks first whether these are outdated."""

    def __init__(self, parts: Parts, pairs: str | None) -> None:
        self.parts, self.pairs, attention = parts, pairs, parts.attention
        self._heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
        self._head_dim, self._width = attention.head_dim, parts.inputs[0].in_features
        self._softcap = getattr(attention, "attn_logit_softcapping", None) or 0.0
        places = _weights(parts)
        self._dicts, self._keys, self._values = zip(*places)
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        # Kept, so that an address is never one of freed memory, whatever is done to a parameter.
        self._kept: list[Any] = [tensor.detach() for tensor in self._tensors]
        self._kept += [tensor.detach() for linear in parts.linears for tensor in linear.parameters(recurse=False)]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))
        self._projections = cpu_block.Projections(norm_of(parts.norms[0]), [linear_of(each) for each in parts.inputs])
        self._tail = cpu_block.Tail(parts.tail())
        norms = [norm_of(norm) for norm in parts.head_norms]
        self._kept += norms
        self._head_norms = [
            (None, True) if norm is None else (norm.native, norm.weight.numel() == self._head_dim)  # type: ignore[union-attr]
            for norm in norms
        ]

    def outdated(self) -> bool:
        return (
            not all(map(is_, map(dict.get, self._dicts, self._keys), self._values))
            or list(map(Tensor.data_ptr, self._tensors)) != self._addresses
        )

    def fit(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether the shapes are those that are read; the layer's own code says what is wrong with others."""
        if x.dim() != 3 or x.shape[2] != self._width or x.numel() == 0:
            return False
        if self.pairs is None:
            return True
        return _served_angles(kwargs.get("position_embeddings"), x, self._head_dim)

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
        return self._tail(self._attend(q, keys, values, attention_mask, kwargs), hidden_states)

    def _project(self, x: Tensor, angles: Any) -> list[Tensor]:
        """q, k and v: [B, T, heads, D]."""
        found = self._projections(x)
        if len(found) == 1:
            widths = [heads * self._head_dim for heads in (*self._heads, self._heads[1])]
            found = [part.contiguous() for part in found[0].split(widths, dim=-1)]
        cos, sin = angles if self.pairs else (None, None)
        for part, heads, (native, per_head) in zip(found, self._heads, self._head_norms):
            if native is not None and not per_head:
                cpu_block.rotate_(part, 1, norm=native)
                native = None
            cpu_block.rotate_(part, heads, cos, sin, native, self.pairs or "halves")
        return [part.unflatten(-1, (-1, self._head_dim)) for part in found]

    def _attend(self, q: Tensor, keys: Tensor, values: Tensor, mask: Any, kwargs: dict[str, Any]) -> Tensor:
        """q: [B, T, heads, D]; keys, values: [B, KV, S, D] -> [B, T, heads * D]."""
        attention = self.parts.attention
        eager = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get(attention.config._attn_implementation, eager)
        ours = function is eager or function is sdpa_attention_forward
        if ours and q.shape[1] <= _FEW_ROWS and _served_mask(mask, q, keys, values):
            # transformers' other functions leave the cap out
            return cpu_block.attend(
                q, keys, values, mask, attention.scaling, self._softcap if function is eager else 0.0
            )
        if hasattr(attention, "sliding_window"):
            kwargs["sliding_window"] = attention.sliding_window
        if self._softcap:
            kwargs["softcap"] = self._softcap
        out, _ = function(
            attention, q.transpose(1, 2), keys, values, mask, dropout=0.0, scaling=attention.scaling, **kwargs
        )
        return out.reshape(*out.shape[:2], -1)

    def typical_score(self, x: Tensor, kwargs: dict[str, Any]) -> float:
        """Root mean square of the products of queries and keys, before they are scaled."""
        q, k, _ = self._project(x, kwargs.get("position_embeddings"))
        k = k.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
        return float((q.transpose(1, 2) @ k.permute(0, 2, 3, 1)).square().mean().sqrt())


class FusedForward:
    """Takes the place of a decoder layer's ``forward``; hands to it whatever it cannot serve.

    Args:
        pairs: see :class:`Calls`: which channels rotary angles turn together, of ``cpu_block.PAIRS``; None for a layer
            without positions.
    """

    def __init__(self, parts: Parts, pairs: str | None) -> None:
        self.layer, self.pairs = parts.layer, pairs
        self.parts: Parts | None = parts
        self._watch: Watch | None = Watch(parts)
        self._calls: Calls | None = None
        self._code = self._watch.code()

    def __call__(self, hidden_states: Tensor, *arguments: Any, **kwargs: Any) -> Any:
        calls = None if arguments else self.serves(hidden_states, kwargs)
        if calls is None:
            return type(self.layer).forward(self.layer, hidden_states, *arguments, **kwargs)
        return calls.run(hidden_states, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.layer).forward.__get__(self.layer))

    def serves(self, x: Tensor, kwargs: dict[str, Any]) -> Calls | None:
        """The calls to run, if nobody expects more of the layer's modules than their result."""
        if torch.compiler.is_compiling() or torch._C._get_tracing_state() or torch.is_grad_enabled():
            return None
        if type(x) is not Tensor or x.dtype not in _DTYPES or not x.is_cpu or torch.is_autocast_enabled("cpu"):
            self._calls = None  # it would keep what may have moved to another device
            return None
        if (
            torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or torch._C._are_functorch_transforms_active()
        ):
            return None
        if not _KNOWN.issuperset(kwargs) or kwargs.get("output_attentions") or kwargs.get("output_hidden_states"):
            return None
        calls = self._current_calls()
        return calls if calls is not None and calls.fit(x, kwargs) else None

    def _current_calls(self) -> Calls | None:
        """Calls that read the modules' present tensors; None where a module was touched, or has others."""
        parts, watch, calls = self.parts, self._watch, self._calls
        if parts is None:
            return None
        if watch is None:  # of a copy
            watch = self._watch = Watch(parts)
            if watch.code() != self._code:
                self._retire()
                return None
        if not watch.untouched():
            if watch.replaced():
                self._retire()
            return None
        if calls is None or calls.outdated():
            try:
                self._calls = calls = Calls(parts, self.pairs)
            except Exception:  # the layer's own code serves, or says better what is wrong
                self._calls = calls = None
        return calls

    def _retire(self) -> None:
        """Leave the layer to its own code for good, and keep nothing alive."""
        self.parts = self._watch = self._calls = None
        if vars(self.layer).get("forward") is self:
            vars(self.layer).pop("forward", None)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which look anew at what they hold."""
        same = self._watch is None or self._watch.unchanged()
        return vars(self) | {"_watch": None, "_calls": None, "parts": self.parts if same else None}


def _weights(parts: Parts) -> list[tuple[dict[str, Any], str, Any]]:
    """Where the parameters lie whose addresses the calls hold, and what lies there."""
    places: list[tuple[dict[str, Any], str, Any]] = []
    for linear in parts.linears:
        held = linear._parameters
        places += [(linear.__dict__, "changes", linear.changes), (linear.__dict__, "_parameters", held)]
        places += [(held, name, held.get(name)) for name in ("qweight", "bias")]
    for norm in (*parts.norms, *parts.head_norms):
        if norm is not None:
            places += [(norm._parameters, name, norm._parameters.get(name)) for name in ("weight", "bias")]
    return places


def _served_angles(angles: Any, x: Tensor, head_dim: int) -> bool:
    if type(angles) is not tuple or len(angles) != 2:
        return False
    cos, sin = angles
    if type(cos) is not Tensor or type(sin) is not Tensor or cos.dtype not in _DTYPES or cos.dtype is not sin.dtype:
        return False
    shape = cos.shape
    if len(shape) != 3 or sin.shape != shape or not (cos.is_cpu and sin.is_cpu):
        return False
    fits = shape[0] in (1, x.shape[0]) and shape[1] == x.shape[1] and shape[2] <= head_dim
    return fits and cos.is_contiguous() and sin.is_contiguous()


def _served_mask(mask: Any, q: Tensor, keys: Tensor, values: Tensor) -> bool:
    """Whether our attention reads the cache and the mask, and knows what is meant where there is none."""
    if type(keys) is not Tensor or type(values) is not Tensor or not (keys.is_cpu and values.is_cpu):
        return False
    if keys.stride(-1) != 1 or values.stride(-1) != 1 or not keys.dtype == values.dtype == q.dtype:
        return False
    batch, rows, heads, head_dim = q.shape
    if keys.shape != values.shape or keys.shape[0] != batch or keys.shape[3] != head_dim or heads % keys.shape[1]:
        return False
    if head_dim > cpu_block.MAX_HEAD:
        return False
    if mask is None:
        return rows == 1
    return (
        type(mask) is Tensor
        and mask.is_cpu
        and mask.dtype in (torch.bool, q.dtype)
        and mask.dim() == 4
        and mask.shape[0] in (1, batch)
        and mask.shape[1] == 1
        and mask.shape[2] in (1, rows)
        and mask.shape[3] >= keys.shape[2]
        and mask.stride(3) == 1
    )
