"""How the CUDA kernels cut a product: which kernel of device/kernels.cuh, and its blocks, warps and splits of K."""

from __future__ import annotations

import functools
import itertools
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from .layout import STRIP


@dataclass(frozen=True)
class Plan:
    """Which kernel of device/kernels.cuh, and how it cuts the work.

    Args:
        strips: of 16 output channels per block of the skinny kernel; 0 for the wide kernel, whose blocks have 8.
        tokens: blocks of 8 tokens that a block multiplies by at once.
        warps: per block of the skinny kernel, sharing K.
        splits: of K over blocks of the wide kernel.
    """

    strips: int
    tokens: int
    warps: int = 8
    splits: int = 1


class Shape(NamedTuple):
    """What a plan depends on, besides the rows of x and the device.

    Args:
        tiles: K / 64, rounded up with each group's padding.
    """

    bits: int
    out_features: int
    tiles: int


# Up to these rows of x: the skinny kernel with 1 and 2 blocks of tokens, the wide kernel. Beyond, the weight is
# dequantized for cuBLAS. Estimates, not measured: `gptq-backend tune` does better on a device.
_SKINNY, _SKINNY2, _WIDE = 8, 16, 128
_SPLIT_COST = 0.02  # share of the time that each further split adds, for partial sums
# Strips and tokens of each skinny kernel, tokens of each wide one: what kernels.cu compiles.
_SKINNY_KERNELS = ((1, 1), (2, 1), (2, 2))
_WIDE_KERNELS = (2, 4, 8)


@functools.lru_cache(4096)
def plan(rows: int, out_features: int, tiles: int, bits: int, processors: int, shared_bytes: int) -> Plan | None:
    """The kernel for x [rows, K]; None: through the dense weight.

    tiles: K / 64, rounded up with each group's padding. processors: multiprocessors of the GPU. shared_bytes: shared
    memory that a block may have.
    """
    strips = math.ceil(out_features / STRIP)
    if rows <= _SKINNY2:
        # Enough warps to keep loads under way everywhere: a block's share K when there are few blocks.
        one = strips < 6 * processors and rows <= _SKINNY
        return Plan(1 if one else 2, 1 if rows <= _SKINNY else 2, 16 if one and strips < processors else 8)
    if rows > _WIDE:
        return None
    tokens = 4 if rows <= 32 else 8
    while _wide_bytes(bits, tokens) > shared_bytes:
        tokens //= 2
    blocks = math.ceil(strips / 8) * math.ceil(rows / (tokens * 8))

    def waves(splits: int) -> float:
        """Time in units of a whole sum over K by one block, a multiprocessor having one at a time."""
        return math.ceil(blocks * splits / processors) / splits * (1 + _SPLIT_COST * (splits - 1))

    return Plan(0, tokens, splits=min(range(1, max(1, min(16, math.ceil(tiles / 2) // 4)) + 1), key=waves))


def _wide_bytes(bits: int, tokens: int) -> int:
    """Shared memory of a block of the wide kernel: three stages of activations and weights (kernels.cuh)."""
    return 3 * (2 * 64 * tokens * 8 * 2 + 8 * 2 * 128 * bits)


def fits(how: Plan | None, tiles: int, bits: int, shared_bytes: int) -> bool:
    """Whether there is such a kernel, and it can run so with weights of these sizes; arguments as of :func:`plan`."""
    if how is None:
        return True
    if how.strips:
        kernel = (how.strips, how.tokens)
        warps = (*range(1, 9), 16) if kernel == (1, 1) else range(1, 9)  # more would want too many registers
        return kernel in _SKINNY_KERNELS and how.warps in warps and how.splits == 1
    most = max(1, min(16, tiles // 4))
    whole = how.tokens in _WIDE_KERNELS and how.warps == 8 and 1 <= how.splits <= most
    return whole and _wide_bytes(bits, how.tokens) <= shared_bytes


def candidates(rows: int, tiles: int, bits: int, shared_bytes: int) -> list[Plan | None]:
    """Plans worth trying for so many rows; None is the way through the dense weight. Arguments as of :func:`plan`."""
    found: list[Plan | None] = [None]
    if rows <= 64:
        found += [Plan(*kernel, warps) for kernel, warps in itertools.product(_SKINNY_KERNELS, (2, 4, 8, 16))]
    splits = (1, 2, 3, 4, 6, 8, 12, 16)
    found += [Plan(0, tokens, splits=count) for tokens, count in itertools.product(_WIDE_KERNELS, splits)]
    return [how for how in found if fits(how, tiles, bits, shared_bytes)]


@functools.cache
def machine(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and the shared memory that a block may have."""
    if device.type == "cpu":  # the emulator of the tests
        return 4, 227 << 10
    properties = torch.cuda.get_device_properties(device)
    # torch < 2.7 does not tell: what every architecture but 7.5 has.
    limit = getattr(properties, "shared_memory_per_block_optin", 64 << 10 if properties.major < 8 else 99 << 10)
    return properties.multi_processor_count, limit
