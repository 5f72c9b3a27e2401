"""GGUF's blocks of quantized weights that a packed weight holds exactly: those that have a scale and no minimum.

A row is a sequence of blocks. All numbers are little-endian; ``d`` is a float16 scale.

| type | block | bytes | value |
|---|---|---|---|
| Q4_0 | 32 | d, 16 of two codes each: element i and i + 16 | d * (code - 8) |
| Q5_0 | 32 | d, 4 of high bits, 16 as Q4_0 | d * (code - 16) |
| Q8_0 | 32 | d, 32 signed | d * code |
| Q3_K | 256 | 32 of high bits, 64 of low ones, 12 of 16 scales with 6 bits each, d | d * (scale - 32) * (code - 4) |
| Q6_K | 256 | 128 of low bits, 64 of high ones, 16 signed scales, d | d * scale * (code - 32) |

The K types have a scale for every 16 elements, which here becomes one float32: the product is exact in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import CheckpointError
from .weight import QuantizedWeight


class _Blocks(NamedTuple):
    """How blocks of one type are read.

    Args:
        elements, nbytes: of a block.
        bits: that hold its codes.
        group: elements of a scale.
        read: uint8 [n, nbytes] -> uint8 codes [n, elements], scales [n, elements / group].
    """

    elements: int
    nbytes: int
    bits: int
    group: int
    read: Callable[[Tensor], tuple[Tensor, Tensor]]


def read_blocks(name: str, kind: str, rows: Tensor, features: int) -> QuantizedWeight | None:
    """A matrix of GGUF's type ``kind``; None if that has no exact counterpart.

    Args:
        name: for messages.
        rows: uint8 [N, bytes of a row].
        features: K.

    Raises:
        CheckpointError: the bytes do not make that many elements.
    """
    if (blocks := _TYPES.get(kind)) is None:
        return None
    count, rest = divmod(features, blocks.elements)
    if rest or rows.shape[1] != count * blocks.nbytes:
        raise CheckpointError(
            f"{name}: {rows.shape[1]} bytes for {features} inputs of type {kind}, expected blocks of {blocks.elements} "
            f"in {blocks.nbytes} bytes; the file is damaged, fetch it again"
        )
    codes, scales = blocks.read(rows.reshape(-1, blocks.nbytes))
    scales = scales.reshape(len(rows), -1).t().contiguous()
    zeros = torch.full(scales.shape, 1 << (blocks.bits - 1), dtype=torch.uint8)
    g_idx = torch.arange(features, dtype=torch.int32) // blocks.group
    return QuantizedWeight(codes.reshape(len(rows), -1).t().contiguous(), scales, zeros, g_idx, blocks.bits)


def _half(data: Tensor) -> Tensor:
    """uint8 [n, 2] -> float16 [n, 1]."""
    return data.contiguous().view(torch.float16)


def _signed(data: Tensor) -> Tensor:
    return data.contiguous().view(torch.int8)


def _nibbles(data: Tensor) -> Tensor:
    """uint8 [n, m] -> [n, 2m]: all low ones before all high ones."""
    return torch.cat([data & 15, data >> 4], 1)


def _q4_0(data: Tensor) -> tuple[Tensor, Tensor]:
    return _nibbles(data[:, 2:]), _half(data[:, :2])


def _q5_0(data: Tensor) -> tuple[Tensor, Tensor]:
    fifth = (data[:, 2:6, None] >> torch.arange(8, dtype=torch.uint8) & 1).reshape(-1, 32)
    return (_nibbles(data[:, 6:]) | fifth << 4) + (128 - 16), _half(data[:, :2])  # held in 8 bits, around 128


def _q8_0(data: Tensor) -> tuple[Tensor, Tensor]:
    return data[:, 2:] ^ 0x80, _half(data[:, :2])  # two's complement plus 128


def _q3_k(data: Tensor) -> tuple[Tensor, Tensor]:
    high, low, packed, d = data[:, :32], data[:, 32:96], data[:, 96:108], _half(data[:, 108:])
    # Two halves of 128 elements: 32 bytes of four 2-bit codes each, of which the first makes elements 0 to 31.
    shifts = torch.arange(0, 8, 2, dtype=torch.uint8)[:, None]
    two = (low.view(-1, 2, 1, 32) >> shifts & 3).reshape(-1, 256)
    third = (high[:, None, :] >> torch.arange(8, dtype=torch.uint8)[:, None] & 1).reshape(-1, 256)
    # Scales 0 to 15: low four bits in eight bytes, high two bits in four.
    four = _nibbles(packed[:, :8])
    top = (packed[:, None, 8:] >> shifts & 3).reshape(-1, 16)
    scales = (four | top << 4).float() - 32
    return two | third << 2, d.float() * scales


def _q6_k(data: Tensor) -> tuple[Tensor, Tensor]:
    low, high, scales, d = data[:, :128], data[:, 128:192], _signed(data[:, 192:208]), _half(data[:, 208:])
    # Two halves of 128 elements: 64 bytes of low nibbles, 32 of four 2-bit codes each.
    four = low.view(-1, 2, 1, 64) >> torch.tensor([0, 4], dtype=torch.uint8)[:, None] & 15
    two = high.view(-1, 2, 1, 32) >> torch.arange(0, 8, 2, dtype=torch.uint8)[:, None] & 3
    codes = four.reshape(-1, 256) | two.reshape(-1, 256) << 4
    return codes + (128 - 32), d.float() * scales.float()  # held in 8 bits, around 128


_TYPES = {
    "Q4_0": _Blocks(32, 18, 4, 32, _q4_0),
    "Q5_0": _Blocks(32, 22, 8, 32, _q5_0),
    "Q8_0": _Blocks(32, 34, 8, 32, _q8_0),
    "Q3_K": _Blocks(256, 110, 3, 16, _q3_k),
    "Q6_K": _Blocks(256, 210, 8, 16, _q6_k),
}
EXACT_TYPES = tuple(_TYPES)
