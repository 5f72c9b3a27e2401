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
        codes = [_vector_code(each, size, "a norm's weight or bias") for each in tensors] or [0]
        if codes[0] != codes[-1]:
            raise ValueError(
                f"a norm's weight is {tensors[0].dtype} and its bias {tensors[-1].dtype}; expected one dtype"
            )
        return _cpu.Norm(
            _address(self.weight), _address(self.bias), codes[0], self.eps, self.offset, self.centered, size
        )


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
            0 if self.bias is None else _vector_code(self.bias, w.out_features, "a bias"),
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
        code = _code(x, width, "x")
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
        _check_tail(parts)
        norms = [
            None if each is None else each.native for each in (parts.after_attention, parts.before_mlp, parts.after_mlp)
        ]
        self._kept = parts, norms, parts.o.native, [each.native for each in parts.gate_up], parts.down.native
        _, _, o, gate_up, down = self._kept
        kind = ACTIVATIONS[parts.activation]
        self._in_features, self._width = parts.o.in_features, parts.o.out_features
        self.native = _cpu.Tail(o, *norms, gate_up, parts.gated, kind, down, parts.factor)

    def __call__(self, x: Tensor, residual: Tensor) -> Tensor:
        """x: [..., o's K]; residual: [..., hidden] of the same dtype -> [..., hidden]."""
        width, inner = self._width, self._in_features
        code = _code(residual, width, "residual")
        if _code(x, inner, "x") != code or x.numel() * width != residual.numel() * inner:
            raise ValueError(
                f"x is {_describe(x)} and residual {_describe(residual)}; expected as many rows of the same dtype"
            )
        x, residual = x.contiguous(), residual.contiguous()
        y = torch.empty_like(residual)
        _cpu.finish_layer(
            self.native,
            code,
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
        norm: ``Norm.native`` [D], or None. The caller keeps its tensors.
        pairs: which channels turn together, see ``PAIRS``.

    Raises:
        ValueError: a tensor has another dtype, device, shape or layout.
    """
    width = x.size(-1) if x.dim() else 1
    dtype = _code(x, width, "x")
    rows = x.numel() // width if width else 0
    dims, positions, code = 0, 1, 0
    if cos is not None:
        dims = cos.size(-1) if cos.dim() else 1
        code = _code(cos, dims, "cos")
        positions = cos.numel() // dims if dims else 0
        if (
            sin is None
            or sin.dtype != cos.dtype
            or sin.numel() != cos.numel()
            or sin.size(-1) != dims
            or not (sin.is_cpu and sin.is_contiguous() and cos.is_contiguous())
            or (positions != rows and (x.dim() < 2 or positions != x.size(-2)))
        ):
            raise ValueError(
                f"cos is {_describe(cos)} and sin {_describe(sin)}; expected both contiguous, alike, and with the "
                f"positions of x, {_describe(x)}"
            )
    if not x.is_contiguous():
        raise ValueError(f"x is {_describe(x)}; expected it to be contiguous, because it is changed in place")
    _cpu.rotate(
        dtype,
        rows,
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
        [B, T, H * D of the values]. A row that sees nothing gives zeros.

    Raises:
        ValueError: a tensor has another dtype, device, shape or layout.
    """
    if q.dim() != 4 or values.dim() != 4:
        raise ValueError(f"q is {_describe(q)} and values {_describe(values)}; expected four dimensions of both")
    batch, rows, heads, head_dim = q.shape
    _, kv_heads, length, value_dim = values.shape
    code = _code(q, head_dim, "q")
    strides = q.stride(), keys.stride(), values.stride()
    if keys.shape != (batch, kv_heads, length, head_dim) or values.shape[0] != batch:
        raise ValueError(
            f"keys are {_describe(keys)} and values {_describe(values)}; expected [B, KV, S, D] of both, for "
            f"q [B, T, H, D], {_describe(q)}"
        )
    if not (keys.dtype == values.dtype == q.dtype and keys.is_cpu and values.is_cpu):
        raise ValueError(
            f"keys are {_describe(keys)} and values {_describe(values)}; expected the dtype and device of q, "
            f"{_describe(q)}"
        )
    if not strides[0][3] == strides[1][3] == strides[2][3] == 1:
        raise ValueError(f"q, keys and values have strides {strides}; expected channels side by side (the last is 1)")
    mask_strides = (0, 0)
    if mask is not None:
        mask_strides = _mask_strides(mask, q, length)
    out = q.new_empty((batch, rows, heads * value_dim))
    _cpu.attend(
        code,
        (batch, rows, heads, kv_heads, head_dim, value_dim, length),
        q.data_ptr(),
        strides[0],
        keys.data_ptr(),
        strides[1],
        values.data_ptr(),
        strides[2],
        _address(mask),
        mask is not None and mask.dtype == torch.bool,
        mask_strides,
        scale,
        softcap,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


# -- checks: what is wrong here would be read past its end ------------------------------------------------------------


def _describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "None"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def _code(x: Tensor, width: int, name: str) -> int:
    """The code of its dtype, if rows of ``width`` can be read."""
    code = DTYPE_CODES.get(x.dtype)
    if code is None or not x.is_cpu or not x.dim() or x.size(-1) != width:
        raise ValueError(
            f"{name} is {_describe(x)}; expected float32, bfloat16 or float16 with a last dimension of {width} on cpu"
        )
    return code


def _vector_code(x: Tensor, size: int, name: str) -> int:
    if x.dim() != 1 or not x.is_contiguous():
        raise ValueError(f"{name} is {_describe(x)} with strides {x.stride()}; expected a contiguous vector")
    return _code(x, size, name)


def _check_tail(parts: TailParts) -> None:
    if parts.activation not in ACTIVATIONS:
        raise ValueError(f"activation={parts.activation!r}; expected one of {', '.join(ACTIVATIONS)}")
    hidden, inner = parts.o.out_features, parts.down.in_features
    shapes = [(each.in_features, each.out_features) for each in (*parts.gate_up, parts.down)]
    expected = [[(hidden, inner)]]
    if parts.gated:
        expected = [[(hidden, inner)] * 2, [(hidden, 2 * inner)]]
    if shapes not in [[*each, (inner, hidden)] for each in expected]:
        raise ValueError(
            f"gate_up and down map {shapes} channels; expected {' or '.join(map(str, expected))} and {(inner, hidden)}"
        )
    for norm in (parts.after_attention, parts.before_mlp, parts.after_mlp):
        for tensor in () if norm is None else (norm.weight, norm.bias):
            if tensor is not None:
                _vector_code(tensor, hidden, "a norm's weight or bias")


def _mask_strides(mask: Tensor, q: Tensor, length: int) -> tuple[int, int]:
    """Of batch and row."""
    batch, rows = q.shape[:2]
    shape, strides = mask.shape, mask.stride()
    if (
        len(shape) != 4
        or mask.dtype not in (torch.bool, q.dtype)
        or not mask.is_cpu
        or shape[0] not in (1, batch)
        or shape[1] != 1
        or shape[2] not in (1, rows)
        or shape[3] < length
        or strides[3] != 1
    ):
        raise ValueError(
            f"the mask is {_describe(mask)} with strides {strides}; expected bool or {q.dtype} "
            f"[1 or {batch}, 1, 1 or {rows}, >= {length}] with positions side by side, on cpu"
        )
    return strides[0] if shape[0] > 1 else 0, strides[2] if shape[2] > 1 else 0


def _address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
