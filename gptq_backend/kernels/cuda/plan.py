"""How the CUDA kernels cut a product: which kernel of device/kernels.cuh, and its blocks, warps and splits of K."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

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


# Up to these rows of x: the skinny kernel with 1 and 2 blocks of tokens, the wide kernel. Beyond, the weight is
# dequantized for cuBLAS. Estimates, not measured: `make bench-gpu` prints what they should be.
_SKINNY, _SKINNY2, _WIDE = 8, 16, 128
_SPLIT_COST = 0.02  # share of the time that each further split adds, for partial sums


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


@functools.cache
def machine(device: torch.device) -> tuple[int, int]:
    """Multiprocessors, and the shared memory that a block may have."""
    if device.type == "cpu":  # the emulator of the tests
        return 4, 227 << 10
    properties = torch.cuda.get_device_properties(device)
    # torch < 2.7 does not tell: what every architecture but 7.5 has.
    limit = getattr(properties, "shared_memory_per_block_optin", 64 << 10 if properties.major < 8 else 99 << 10)
    return properties.multi_processor_count, limit
