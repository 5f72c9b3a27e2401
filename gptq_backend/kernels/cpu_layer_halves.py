"""A decoder layer whose attention somebody else computes, in two operators (csrc/cpu/layer_halves.h).

They take few arguments, and none that a graph would have to be made anew for: which weights they multiply by is looked
up by a number, the key, when they run. A graph that was compiled in another process is given the keys of this one.
"""

from __future__ import annotations

import secrets
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cpu import _cpu, register_inference
from .cpu_block import Linear, Norm, Projections, check_norm
from .cpu_tail import Tail, TailParts
from .cpu_tensors import address, describe, dtype_code
from .operators import define_without_gradients

_HALVES: weakref.WeakValueDictionary[int, _Half] = weakref.WeakValueDictionary()


class _Half:
    """What a key stands for, as long as this lives.

    Attributes:
        key: int64 [1], the operators' argument.
    """

    def __init__(self) -> None:
        number = secrets.randbits(62)
        self.key = torch.tensor([number])
        _HALVES[number] = self
        # Not at the end of the process, where another thread may still run the model.
        weakref.finalize(self, _cpu.forget_half, number).atexit = False

    @property
    def number(self) -> int:
        return int(self.key)


class LayerStart(_Half):
    """``sum = x + residual`` and ``y``, the outputs of all ``linears`` for ``norm(sum)`` side by side.

    Raises:
        ValueError: sizes do not fit together.
    """

    def __init__(self, norm: Norm | None, linears: Sequence[Linear]) -> None:
        super().__init__()
        self._kept = projections = Projections(norm, linears)
        self.in_features, self.outputs = linears[0].in_features, sum(each.out_features for each in linears)
        check_norm(norm, self.in_features)
        _cpu.keep_start(self.number, *projections.native)

    def __call__(self, x: Tensor, residual: Tensor | None) -> tuple[Tensor, Tensor]:
        """x, residual: 16 bits or float32 [..., K] of the same dtype, or None -> y [..., N] and sum [..., K]."""
        y, total = _START(x, residual, self.key, self.outputs)
        return y, total


class LayerEnd(_Half):
    """``h = residual + after_attention(o(x))`` and ``y = after_mlp(mlp(before_mlp(h)))``: a tail, but for its last sum.

    Raises:
        ValueError: sizes do not fit together, or it has a mixture or a factor.
    """

    def __init__(self, parts: TailParts) -> None:
        super().__init__()
        self._kept = tail = Tail(parts)
        self.in_features, self.width = parts.output.o.in_features, parts.output.o.out_features
        _cpu.keep_end(self.number, tail.native)

    def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x: 16 bits or float32 [..., o's K]; residual: [..., hidden] of the same dtype -> y and h, [..., hidden]."""
        y, h = _END(x, residual, self.key)
        return y, h


def start_layer(x: Tensor, residual: Tensor | None, key: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    """See :class:`LayerStart`.

    Raises:
        ValueError: no layer of this process has that key, or shapes, dtypes or devices do not fit together.
    """
    half = _find(key, LayerStart)
    if outputs != half.outputs:
        raise ValueError(f"outputs={outputs}; expected {half.outputs}, as the weights of the key have")
    code = dtype_code(x, half.in_features, "x")
    if residual is not None and (
        residual.shape != x.shape or dtype_code(residual, half.in_features, "residual") != code
    ):
        raise ValueError(f"x is {describe(x)} and residual {describe(residual)}; expected the same of both")
    x, residual = x.contiguous(), None if residual is None else residual.contiguous()
    y, total = x.new_empty((*x.shape[:-1], outputs)), torch.empty_like(x)
    rows, threads = x.numel() // half.in_features, torch.get_num_threads()
    places = x.data_ptr(), address(residual), y.data_ptr(), total.data_ptr()
    _cpu.start_layer(half.number, code, rows, *places, threads)
    return y, total


def end_layer(x: Tensor, residual: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    """See :class:`LayerEnd`.

    Raises:
        ValueError: as for :func:`start_layer`.
    """
    half = _find(key, LayerEnd)
    code = dtype_code(residual, half.width, "residual")
    if dtype_code(x, half.in_features, "x") != code or x.shape[:-1] != residual.shape[:-1]:
        raise ValueError(
            f"x is {describe(x)} and residual {describe(residual)}; expected as many rows of the same dtype"
        )
    x, residual = x.contiguous(), residual.contiguous()
    y, h = torch.empty_like(residual), torch.empty_like(residual)
    places = x.data_ptr(), residual.data_ptr(), y.data_ptr(), h.data_ptr()
    _cpu.end_layer(half.number, code, residual.numel() // half.width, *places, torch.get_num_threads())
    return y, h


def _find(key: Tensor, kind: type[Any]) -> Any:
    fits = key.dtype == torch.int64 and key.shape == (1,) and key.is_cpu
    half = _HALVES.get(int(key)) if fits else None
    if not isinstance(half, kind):
        raise ValueError(
            f"key is {describe(key)} and that of no {kind.__name__} of this process; expected its attribute key"
        )
    return half


def _fake_start(x: Tensor, residual: Tensor | None, key: Tensor, outputs: int) -> tuple[Tensor, Tensor]:
    return x.new_empty((*x.shape[:-1], outputs)), x.new_empty(x.shape)


def _fake_end(x: Tensor, residual: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
    return residual.new_empty(residual.shape), residual.new_empty(residual.shape)


def _define(name: str, arguments: str, function: Any, fake: Any) -> Any:
    schema = f"({arguments}) -> (Tensor, Tensor)"
    return define_without_gradients(name, schema, function, fake, "CPU", register_inference)


_START = _define("cpu_start_layer", "Tensor x, Tensor? residual, Tensor key, int outputs", start_layer, _fake_start)
_END = _define("cpu_end_layer", "Tensor x, Tensor residual, Tensor key", end_layer, _fake_end)
