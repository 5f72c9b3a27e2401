"""The steps of a decoder layer around its attention, in few calls over the CPU kernels (csrc/cpu/block.h).

A decoding step of a small model spends most of its time between products: in norms, activations and the calls
themselves. Here a norm and the products that read it are one call, and so is all that follows the attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cpu import KERNEL, W4A8, WeightFields, _cpu
from .devices import DTYPE_CODES
from .interface import PreparedWeight

ACTIVATIONS = {"silu": 0, "gelu": 1, "gelu_tanh": 2, "relu": 3, "relu_squared": 4}
# Half of dims apart (LLaMA); neighbours, with an angle for each channel (GPT-J), or for each pair (GLM).
PAIRS = {"halves": 0, "neighbours": 1, "neighbours_by_pair": 2}
MAX_HEAD = 512  # channels


def why_not(weight: PreparedWeight, bias: Tensor | None = None) -> str | None:
    """``None``, or why these calls cannot multiply by ``weight``."""
    if _cpu is None or weight.kernel not in (KERNEL, W4A8):
        return f"the kernel {weight.kernel.name} serves it"
    if bias is not None and bias.dtype not in DTYPE_CODES:
        return f"its bias is {bias.dtype}"
    return None


@dataclass(frozen=True)
class Norm:
    """``(x - mean) / deviation * (weight + offset) + bias``; the mean is taken as 0 unless ``centered``.

    Args:
        weight, bias: float [n] or None.
    """

    weight: Tensor | None
    bias: Tensor | None = None
    eps: float = 1e-6
    offset: float = 0.0
    centered: bool = False

    @property
    def native(self) -> Any:
        tensors = [each for each in (self.weight, self.bias) if each is not None]
        code = DTYPE_CODES[tensors[0].dtype] if tensors else 0
        return _cpu.Norm(_address(self.weight), _address(self.bias), code, self.eps, self.offset, self.centered)


@dataclass(frozen=True)
class Linear:
    """A quantized weight [N, K] with its bias [N] or None; see :func:`why_not`."""

    weight: PreparedWeight
    bias: Tensor | None = None

    @property
    def native(self) -> Any:
        w = WeightFields(*self.weight.kernel.layout.arguments(self.weight.spec, self.weight.tensors))
        return _cpu.Linear(
            w.qweight.data_ptr(),
            w.scales.data_ptr(),
            DTYPE_CODES[w.scales.dtype],
            _address(w.zeros),
            _address(w.perm),
            w.blocks.data_ptr(),
            w.bits,
            w.in_features,
            w.out_features,
            w.qweight.shape[1] * 32 // w.bits,
            w.scales.shape[1],
            w.blocks.shape[0],
            _address(self.bias),
            0 if self.bias is None else DTYPE_CODES[self.bias.dtype],
            w.a8,
        )

    @property
    def out_features(self) -> int:
        return self.weight.spec.out_features

    @property
    def in_features(self) -> int:
        return self.weight.spec.in_features


class Projections:
    """The products of one input, after a norm or not."""

    def __init__(self, norm: Norm | None, linears: Sequence[Linear]) -> None:
        self._kept = (norm, tuple(linears))
        self._norm = None if norm is None else norm.native
        self._linears = [linear.native for linear in linears]
        self._widths = [linear.out_features for linear in linears]
        self._in_features = linears[0].in_features

    def __call__(self, x: Tensor) -> list[Tensor]:
        """x: 16 bits or float32 [..., K] on a CPU -> [..., N] of each in the dtype of x."""
        x, width = x.contiguous(), self._in_features
        ys = [x.new_empty((*x.shape[:-1], each)) for each in self._widths]
        _cpu.project(
            DTYPE_CODES[x.dtype],
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
class TailParts:
    """What follows the attention: ``h = residual + factor * after_attention(o(x))``, then ``y = h + factor *
    after_mlp(down(activation(gate(n)) * up(n)))`` with ``n = before_mlp(h)``.

    Args:
        gate_up: gate and up, or one weight with the outputs of both; or, unless ``gated``, the only one.
    """

    o: Linear
    gate_up: tuple[Linear, ...]
    down: Linear
    activation: str
    gated: bool = True
    after_attention: Norm | None = None
    before_mlp: Norm | None = None
    after_mlp: Norm | None = None
    factor: float = 1.0


class Tail:
    """Runs :class:`TailParts`."""

    def __init__(self, parts: TailParts) -> None:
        norms = [
            None if each is None else each.native for each in (parts.after_attention, parts.before_mlp, parts.after_mlp)
        ]
        self._kept = parts, norms, parts.o.native, [each.native for each in parts.gate_up], parts.down.native
        _, _, o, gate_up, down = self._kept
        kind = ACTIVATIONS[parts.activation]
        self._native = _cpu.Tail(o, *norms, gate_up, parts.gated, kind, down, parts.factor)

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """x: [..., o's K]; residual: [..., hidden] of the same dtype -> [..., hidden]."""
        x, residual = x.contiguous(), residual.contiguous()
        width = residual.shape[-1]
        y = torch.empty_like(residual)
        _cpu.finish_layer(
            self._native,
            DTYPE_CODES[residual.dtype],
            residual.numel() // width,
            width,
            x.data_ptr(),
            residual.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y


def rotate_(
    x: Tensor,
    heads: int,
    cos: Tensor | None = None,
    sin: Tensor | None = None,
    norm: Any = None,
    pairs: str = "halves",
) -> Tensor:
    """Normalize the heads of x and turn them by rotary angles, in place.

    Args:
        x: contiguous [..., T, heads * D].
        cos, sin: contiguous float [..., T, dims], dims <= D, one sequence of them or as many as x has; or None.
        norm: ``Norm.native`` [D], or None.
        pairs: which channels turn together, see ``PAIRS``.
    """
    width = x.shape[-1]
    dims, positions, code = 0, 1, 0
    if cos is not None:
        dims, code = cos.shape[-1], DTYPE_CODES[cos.dtype]
        positions = cos.numel() // dims
    _cpu.rotate(
        DTYPE_CODES[x.dtype],
        x.numel() // width,
        width,
        x.data_ptr(),
        heads,
        norm,
        code,
        dims,
        PAIRS[pairs],
        positions,
        _address(cos),
        _address(sin),
        torch.get_num_threads(),
    )
    return x


def attend(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    mask: Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Attention of a few query rows over a cache.

    Args:
        q: [B, T, H, D] with any strides, but channels side by side.
        keys, values: [B, KV, S, D] likewise, of the dtype of q.
        mask: bool (True: seen) or of the dtype of q (added), [B or 1, 1, T or 1, >= S]; None: row t sees positions up
            to S - T + t.
        softcap: scores become ``softcap * tanh(score / softcap)``, unless it is 0.

    Returns:
        [B, T, H * D of the values].
    """
    batch, rows, heads, head_dim = q.shape
    _, kv_heads, length, value_dim = values.shape
    out = q.new_empty((batch, rows, heads * value_dim))
    mask_strides = (0, 0, 0)
    if mask is not None:
        mask_strides = tuple(s if n > 1 else 0 for s, n in zip(mask.stride()[:3], mask.shape[:3]))  # type: ignore[assignment]
    _cpu.attend(
        DTYPE_CODES[q.dtype],
        (batch, rows, heads, kv_heads, head_dim, value_dim, length),
        q.data_ptr(),
        q.stride()[:3],
        keys.data_ptr(),
        keys.stride()[:3],
        values.data_ptr(),
        values.stride()[:3],
        _address(mask),
        mask is not None and mask.dtype == torch.bool,
        mask_strides,
        scale,
        softcap,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
