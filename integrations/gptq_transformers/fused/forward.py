"""The forward pass of a decoder layer in few calls: projections, cache, attention, and all that follows."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as nn_module
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from gptq_backend.kernels import cpu_block
from gptq_backend.kernels.cpu_block import Projections, Tail

from .cache import append
from .match import NoMatch, Parts, linear_of, norm_of

_FEW_ROWS = 8  # of queries, up to which our attention is faster than torch's
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# A layer that is asked for more serves as it always did.
_KNOWN = frozenset(
    ("attention_mask", "position_ids", "past_key_values", "use_cache", "position_embeddings", "cache_position",
     "output_attentions")
)  # fmt: skip


class FusedForward:
    """Takes the place of a decoder layer's ``forward``; hands to it whatever it cannot serve.

    Args:
        pairs: which channels rotary angles turn together, of ``cpu_block.PAIRS``; None for a layer without positions.
    """

    def __init__(self, parts: Parts, pairs: str | None) -> None:
        self.parts, self.pairs = parts, pairs
        attention = parts.attention
        self._heads = attention.config.num_attention_heads, attention.config.num_key_value_heads
        self._head_dim = attention.head_dim
        self._softcap = getattr(attention, "attn_logit_softcapping", None) or 0.0
        self._watched = list(_places(parts))
        self._found: list[int] = []  # what the calls were made of

    def __call__(self, hidden_states: Tensor, *arguments: Any, **kwargs: Any) -> Any:
        if arguments or not self.serves(hidden_states, kwargs):
            layer = self.parts.layer
            return type(layer).forward(layer, hidden_states, *arguments, **kwargs)
        return self.run(hidden_states, **kwargs)

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles: the calls hold addresses, and are made again."""
        made = ("_projections", "_tail", "_kept", "_head_norms")
        return {key: value for key, value in vars(self).items() if key not in made} | {"_found": []}

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
        if q.shape[1] <= _FEW_ROWS and _served_mask(mask, q, keys):
            # transformers' other functions leave the cap out
            softcap = self._softcap if attention.config._attn_implementation == "eager" else 0.0
            return cpu_block.attend(q, keys, values, mask, attention.scaling, softcap)
        eager = getattr(sys.modules[type(attention).__module__], "eager_attention_forward", None)
        function = ALL_ATTENTION_FUNCTIONS.get_interface(attention.config._attn_implementation, eager)
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

    # -- whether it serves -----------------------------------------------------------------------------------------

    def serves(self, x: Tensor, kwargs: dict[str, Any]) -> bool:
        """Whether nobody expects more of the layer's modules than their result."""
        if type(x) is not Tensor or x.dtype not in _DTYPES or not x.is_cpu or self.parts.layer.training:
            return False
        if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch.is_autocast_enabled("cpu"):
            return False
        if torch._C._len_torch_dispatch_stack() or torch._C._len_torch_function_stack():
            return False
        if not _KNOWN.issuperset(kwargs) or kwargs.get("output_attentions"):
            return False
        if self.pairs and not _served_angles(kwargs.get("position_embeddings"), x):
            return False
        return self._untouched() and self._read(x)

    def _untouched(self) -> bool:
        """Whether no module inside was replaced or hooked."""
        if nn_module._global_forward_hooks or nn_module._global_forward_pre_hooks:
            return False
        for siblings, name, module in self._watched:
            state = module.__dict__
            if siblings.get(name) is not module or state["_forward_hooks"] or state["_forward_pre_hooks"]:
                return False
            if "forward" in state:
                return False
        return True

    def _read(self, x: Tensor) -> bool:
        """Make the calls read the modules' present tensors; False where these want gradients, or cannot be read."""
        parts = self.parts
        vectors = [norm.weight for norm in (*parts.norms, *parts.head_norms) if norm is not None]
        vectors += [linear.bias for linear in parts.linears if linear.bias is not None]
        if torch.is_grad_enabled() and (x.requires_grad or any(vector.requires_grad for vector in vectors)):
            return False
        found = [id(linear.prepared) for linear in parts.linears]  # which the calls keep alive
        found += [vector.data_ptr() for vector in vectors]
        if found != self._found:
            try:
                self._make_calls()
            except NoMatch:
                return False
            self._found = found
        return True

    def _make_calls(self) -> None:
        parts = self.parts
        self._projections = Projections(norm_of(parts.norms[0]), [linear_of(each) for each in parts.inputs])
        self._tail = Tail(parts.tail())
        norms = [norm_of(norm) for norm in parts.head_norms]
        self._kept = norms
        self._head_norms = [
            (None, True) if norm is None else (norm.native, len(norm.weight) == self._head_dim) for norm in norms
        ]


def _places(parts: Parts) -> Iterator[tuple[dict[str, Any], str, nn.Module]]:
    """Each module of a layer, as a child of another."""
    inside = {id(module) for module in parts.modules()}
    for parent in (parts.layer, parts.attention, parts.layer.mlp):
        for name, child in parent._modules.items():
            if id(child) in inside:
                yield parent._modules, name, child


def _served_angles(angles: Any, x: Tensor) -> bool:
    if not isinstance(angles, tuple) or len(angles) != 2:
        return False
    return all(
        type(each) is Tensor
        and each.dtype in _DTYPES
        and each.dim() == 3
        and each.shape[0] in (1, x.shape[0])
        and each.shape[1] == x.shape[1]
        and each.is_contiguous()
        for each in angles
    )


def _served_mask(mask: Any, q: Tensor, keys: Tensor) -> bool:
    """Whether our attention reads the mask, and knows what is meant where there is none."""
    if keys.stride(-1) != 1 or keys.dtype != q.dtype or q.shape[-1] > cpu_block.MAX_HEAD:
        return False
    if mask is None:
        return q.shape[1] == 1
    return (
        type(mask) is Tensor
        and mask.dtype in (torch.bool, q.dtype)
        and mask.dim() == 4
        and mask.shape[0] in (1, q.shape[0])
        and mask.shape[1] == 1
        and mask.shape[2] in (1, q.shape[1])
        and mask.shape[3] >= keys.shape[2]
        and mask.stride(3) == 1
    )
