"""The steps of a decoder layer around its attention, in few calls over the CPU kernels (csrc/cpu/block.h).

A decoding step of a small model spends most of its time between products: in norms, activations and the calls
themselves. Here a norm and the products that read it are one call, and so is all that follows the attention.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cpu import KERNEL, W4A8, WeightFields, _cpu, addresses
from .cpu_tensors import address, describe, dtype_code, vector_code
from .devices import DTYPE_CODES
from .interface import PreparedWeight

FUSE_VARIABLE = "GPTQ_BACKEND_FUSE"
ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu_squared": 4}


def fusing_is_off() -> bool:
    """Whether the user wants decoder layers to run module by module."""
    return os.environ.get(FUSE_VARIABLE, "1") in ("0", "false")


def why_not(weight: PreparedWeight, bias: Tensor | None = None) -> str | None:
    """``None``, or why these calls cannot multiply by ``weight``."""
    if _cpu is None or weight.kernel not in (KERNEL, W4A8):
        return f"the kernel {weight.kernel.name} serves it"
    if not weight.tensors["qweight"].is_cpu:
        return f"its tensors are on {weight.tensors['qweight'].device}"
    if bias is not None and bias.dtype not in DTYPE_CODES:
        return f"its bias is {bias.dtype}"
    return None


@dataclass(frozen=True)
class Norm:
    """``(x - mean) / deviation * (weight + offset) + bias``; the mean is taken as 0 unless ``centered``.

    Args:
        weight, bias: float [n] of one dtype, or None.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    eps: float = 1e-6
    offset: float = 0.0
    centered: bool = False

    @property
    def native(self) -> Any:
        tensors = [each for each in (self.weight, self.bias) if each is not None]
        size = tensors[0].numel() if tensors else 0
        codes = [vector_code(each, size, "a norm's weight or bias") for each in tensors] or [0]
        if codes[0] != codes[-1]:
            raise ValueError(
                f"a norm's weight is {tensors[0].dtype} and its bias {tensors[-1].dtype}; expected one dtype"
            )
        return _cpu.Norm(address(self.weight), address(self.bias), codes[0], self.eps, self.offset, self.centered, size)


@dataclass(frozen=True)
class Linear:
    """A quantized weight [N, K] with its bias [N] or None; see :func:`why_not`."""

    weight: PreparedWeight
    bias: Tensor | None = None

    @property
    def native(self) -> Any:
        if (reason := why_not(self.weight, self.bias)) is not None:
            raise ValueError(f"a weight cannot be part of fused calls: {reason}; load it with the kernel 'cpu'")
        w = WeightFields(*self.weight.kernel.layout.arguments(self.weight.spec, self.weight.tensors))
        code = 0 if self.bias is None else vector_code(self.bias, w.out_features, "a bias")
        return _cpu.Linear(*addresses(w), address(self.bias), code, w.a8)

    @property
    def out_features(self) -> int:
        return self.weight.spec.out_features

    @property
    def in_features(self) -> int:
        return self.weight.spec.in_features


class Projections:
    """The products of one input, after a norm or not."""

    def __init__(self, norm: Norm | None, linears: Sequence[Linear]) -> None:
        if len({linear.in_features for linear in linears}) != 1:
            sizes = [linear.in_features for linear in linears]
            raise ValueError(f"weights have {sizes} input channels; expected one or more that read the same input")
        self._kept = (norm, tuple(linears))
        self._norm = None if norm is None else norm.native
        self._linears = [linear.native for linear in linears]
        self._widths = [linear.out_features for linear in linears]
        self._in_features = linears[0].in_features

    @property
    def native(self) -> tuple[Any, list[Any]]:
        """The norm and the weights."""
        return self._norm, self._linears

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x: 16 bits or float32 [..., K] on a CPU -> [..., N] of each in the dtype of x."""
        width = self._in_features
        code = dtype_code(x, width, "x")
        x = x.contiguous()
        ys = [x.new_empty((*x.shape[:-1], each)) for each in self._widths]
        _cpu.project(
            code,
            x.numel() // width,
            width,
            x.data_ptr(),
            self._norm,
            self._linears,
            [y.data_ptr() for y in ys],
            torch.get_num_threads(),
        )
        return ys


@dataclass(frozen=True)
class OutputParts:
    """What follows the attention: ``h = residual + factor * after_attention(o(x))``, and ``n = before_mlp(h)``.

    Args:
        parallel: whether the MLP reads what the attention read: ``n = before_mlp(residual)``.
    """

    o: Linear
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    factor: float = 1.0
    parallel: bool = False


class AfterAttention:
    """A call that follows the attention.

    Args:
        o: the weight that it begins with.
    """

    native: Any

    def __init__(self, o: Linear) -> None:
        self._in_features, self._width = o.in_features, o.out_features

    def _call(self, function: Any, x: Tensor, residual: Tensor, *outputs: Tensor) -> None:
        """Call ``function`` for x [..., o's K] and residual [..., hidden] of the same dtype.

        Raises:
            ValueError: their shapes do not fit together.
        """
        width, inner = self._width, self._in_features
        code = dtype_code(residual, width, "residual")
        if dtype_code(x, inner, "x") != code or x.numel() * width != residual.numel() * inner:
            raise ValueError(
                f"x is {describe(x)} and residual {describe(residual)}; expected as many rows of the same dtype"
            )
        x, residual = x.contiguous(), residual.contiguous()
        rows, addresses = residual.numel() // width, map(Tensor.data_ptr, (x, residual, *outputs))
        function(self.native, code, rows, width, *addresses, torch.get_num_threads())


class Output(AfterAttention):
    """Runs :class:`OutputParts`."""

    def __init__(self, parts: OutputParts) -> None:
        super().__init__(parts.o)
        for norm in (parts.after_attention, parts.before_mlp):
            check_norm(norm, parts.o.out_features)
        norms = [None if each is None else each.native for each in (parts.after_attention, parts.before_mlp)]
        o = parts.o.native
        self._kept = parts, norms, o
        self.native = _cpu.Output(o, *norms, parts.factor, parts.parallel)

    def __call__(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """x: [..., o's K]; residual: [..., hidden] of the same dtype -> h and n, [..., hidden]."""
        h, n = (torch.empty_like(residual, memory_format=torch.contiguous_format) for _ in range(2))
        self._call(_cpu.finish_attention, x, residual, h, n)
        return h, n


def check_norm(norm: Norm | None, size: int) -> None:
    for tensor in () if norm is None else (norm.weight, norm.bias):
        if tensor is not None:
            vector_code(tensor, size, "a norm's weight or bias")
