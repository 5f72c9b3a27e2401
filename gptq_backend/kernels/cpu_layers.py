"""Several decoder layers in one call of the CPU kernels (csrc/cpu/layers.cpp), with keys and values in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .cpu import _cpu
from .cpu_attention import PAIRS, mask_strides
from .cpu_block import Linear, Norm, Projections
from .cpu_dense import Dense
from .cpu_tail import Tail
from .cpu_tensors import address, describe, dtype_code
from .devices import DTYPE_CODES


class Layer:
    """A decoder layer.

    Args:
        inputs: q, k and v of one input, or one weight with the outputs of all.
        head_norms: ``Norm.native`` of q and k, as wide as a head or as all of them, or None. The caller keeps their
            tensors.
        pairs: which channels turn together, of ``PAIRS``; None: the layer has no positions.

    Raises:
        ValueError: sizes do not fit together.
    """

    def __init__(
        self,
        inputs: Projections,
        head_norms: Sequence[Any],
        pairs: str | None,
        heads: int,
        kv_heads: int,
        head_dim: int,
        scale: float,
        softcap: float,
        tail: Tail,
    ) -> None:
        self._kept = inputs, head_norms, tail
        norm, linears = inputs.native
        self.kv_shape, self.top_k = (kv_heads, head_dim), tail.top_k
        code = -1 if pairs is None else PAIRS[pairs]
        self.native = _cpu.Layer(
            norm, linears, *head_norms, code, heads, kv_heads, head_dim, scale, softcap, tail.native
        )


class Room:
    """Keys and values [B, KV, capacity, D] of one layer, contiguous and of one dtype."""

    def __init__(self, keys: Tensor, values: Tensor) -> None:
        if keys.shape != values.shape or keys.dim() != 4 or not (keys.is_contiguous() and values.is_contiguous()):
            raise ValueError(
                f"keys are {describe(keys)} and values {describe(values)}; expected two contiguous tensors "
                "[B, KV, capacity, D] of one shape"
            )
        if keys.dtype != values.dtype or not (keys.is_cpu and values.is_cpu):
            raise ValueError(
                f"keys are {describe(keys)} and values {describe(values)}; expected both in one dtype on cpu"
            )
        self.keys, self.values = keys, values
        self._kind = keys.dtype, keys.shape[0], (keys.shape[1], keys.shape[3])
        self._capacity = keys.shape[2]

    def fits(self, layer: Layer, x: Tensor) -> bool:
        """x: [B, T, H]."""
        return self._kind == (x.dtype, x.shape[0], layer.kv_shape)

    def at(self, length: int) -> tuple[int, int, int, int]:
        """For the call: where it lies (sharing it between processes moves it), and how many positions are in use."""
        return self.keys.data_ptr(), self.values.data_ptr(), length, self._capacity


class Ending:
    """What follows the last layer: the head's product of what a norm makes of its result.

    Raises:
        ValueError: sizes do not fit together.
    """

    def __init__(self, norm: Norm, head: Linear | Dense) -> None:
        natives = norm.native, head.native
        quantized, dense = (natives[1], None) if isinstance(head, Linear) else (None, natives[1])
        self.native, self.outputs = _cpu.Ending(natives[0], quantized, dense), head.out_features
        self._kept = norm, head, natives


class Results:
    """What each layer gave: ``ys`` [L, B, T, H]; knows later whether somebody changed it.

    Args:
        chosen: int32, for each layer the experts of all rows, of each as many as ``top_k`` says.
        logits: [B, T, V], with an ending. What its norm gave is then the last of ``ys``.
    """

    def __init__(self, ys: Tensor, chosen: Tensor, top_k: Sequence[int], logits: Tensor | None) -> None:
        self.ys, self._chosen, self._top_k, self.logits = ys, chosen, top_k, logits
        self._copy = ys.clone()
        self._bytes = ys[0].numel() * ys.element_size()
        self._first = ys.data_ptr(), self._copy.data_ptr()

    def chosen(self, index: int) -> Tensor:
        """The experts that rows chose in layer ``index``, int32 [B * T * top_k]."""
        rows = self.ys[0, ..., 0].numel()
        return self._chosen[index, : rows * self._top_k[index]]

    def y(self, index: int) -> Tensor:
        """What layer ``index`` gave. For autograd it has nothing to do with what others did."""
        return self.ys[index].data

    def intact(self, index: int, y: Tensor) -> bool:
        """Whether ``y`` is the result of layer ``index``, or at -1 the last of ``ys``, as it was."""
        index %= len(self.ys)
        at, copy = (first + index * self._bytes for first in self._first)
        return y.data_ptr() == at and _cpu.same_bytes(at, copy, self._bytes)


def run_layers(
    layers: Sequence[Layer],
    rooms: Sequence[Room],
    lengths: Sequence[int],
    x: Tensor,
    angles: tuple[Tensor, Tensor] | None = None,
    mask: Tensor | None = None,
    ending: Ending | None = None,
) -> Results:
    """Run layers one after the other, each on the result of the one before.

    Positions ``length`` to ``length + T`` of each room are written to, and nothing else of it.

    Args:
        rooms, lengths: one for each layer, and how many positions of it are in use.
        x: [B, T, H] of 16 bits or float32.
        angles: cos and sin, contiguous float [B or 1, T, dims] of one dtype; None: no layer turns.
        mask: see :func:`gptq_backend.kernels.cpu_block.attend`; it is that of all layers.
        ending: what is computed from the last result, or None.

    Raises:
        ValueError: shapes, dtypes or devices do not fit together.
    """
    code = dtype_code(x, x.size(-1), "x")
    if x.dim() != 3 or not all(room.fits(layer, x) for room, layer in zip(rooms, layers)):
        raise ValueError(f"x is {describe(x)}; expected [B, T, H] with the batch and dtype of all keys and values")
    if len(set(map(id, rooms))) != len(rooms):
        raise ValueError("two layers have the same room; expected one for each, as both would write to the same place")
    batch, positions, width = x.shape
    x = x.contiguous()
    numbers = [room.at(length) for room, length in zip(rooms, lengths, strict=True)]
    (cos, sin), angle_rows, dims, angles_code = _angles(angles, x)
    strides = (0, 0)
    if mask is not None:
        strides = mask_strides(mask, x, max(lengths) + positions)
    ys = x.new_empty((len(layers) + (ending is not None), batch, positions, width))
    logits = None if ending is None else x.new_empty((batch, positions, ending.outputs))
    top_k = [layer.top_k for layer in layers]
    chosen = torch.empty((len(layers), batch * positions * max(top_k)), dtype=torch.int32)
    _cpu.run_layers(
        [layer.native for layer in layers],
        numbers,
        code,
        (batch, positions, width),
        x.data_ptr(),
        (cos, sin),
        angles_code,
        angle_rows,
        dims,
        address(mask),
        mask is not None and mask.dtype == torch.bool,
        strides,
        ys.data_ptr(),
        chosen.data_ptr(),
        chosen.shape[1],
        None if ending is None else ending.native,
        (ys[-1].data_ptr(), address(logits)),
        torch.get_num_threads(),
    )
    return Results(ys, chosen, top_k, logits)


def _angles(angles: tuple[Tensor, Tensor] | None, x: Tensor) -> tuple[tuple[int, int], int, int, int]:
    """Addresses, rows, dims, and the code of the dtype."""
    if angles is None:
        return (0, 0), 1, 0, 0
    cos, sin = angles
    shape = cos.shape
    if (
        len(shape) != 3
        or sin.shape != shape
        or cos.dtype != sin.dtype
        or cos.dtype not in DTYPE_CODES
        or shape[0] not in (1, x.shape[0])
        or shape[1] != x.shape[1]
        or not (cos.is_cpu and sin.is_cpu and cos.is_contiguous() and sin.is_contiguous())
    ):
        raise ValueError(
            f"cos is {describe(cos)} and sin {describe(sin)}; expected both contiguous, alike, and "
            f"[1 or {x.shape[0]}, {x.shape[1]}, dims] on cpu"
        )
    return (cos.data_ptr(), sin.data_ptr()), shape[0] * shape[1], shape[2], DTYPE_CODES[cos.dtype]
