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


class Gpu(NamedTuple):
    """What a plan depends on of the device.

    Args:
        processors: multiprocessors.
        shared_bytes: shared memory that a block may have.
        capability: compute capability, major and minor.
    """

    processors: int
    shared_bytes: int
    capability: tuple[int, int]


# All that follows are estimates by counts of instructions (docs/benchmarks/gpu_model.py), not measured: `gptq-backend
# tune` does better on a device.
_SKINNY = 16  # up to these rows of x: a skinny kernel
# Up to these rows a wide kernel, by the major compute capability; beyond, the weight is dequantized for cuBLAS. That
# pays late where `mma.sync` is as fast as what cuBLAS uses, which it is not on 9 and 10. 7.5 copies through registers.
_WIDE = {7: 128, 8: 1024, 12: 1024}
_WIDE_ELSE = 256
# Instructions of a warp. Strips and blocks of tokens of each skinny kernel: for a tile of one strip.
_SKINNY_COSTS = {(1, 1): 76, (1, 2): 85, (2, 1): 69, (2, 2): 74}
# Blocks of tokens of each wide kernel: for a stage.
_WIDE_COSTS = {2: 335, 4: 399, 8: 509}
_BESIDE, _BESIDE_WIDE = 250, 600  # before the first and after the last of these
_BUSY = 12  # warps that keep a multiprocessor busy
_SPLIT_COST = 0.02  # share of the time that each further split adds, for partial sums
_WIDE_STRIPS, _STAGE_TILES = 8, 4  # of a block of a wide kernel, and of one of its stages


@functools.lru_cache(4096)
def plan(rows: int, out_features: int, tiles: int, bits: int, gpu: Gpu) -> Plan | None:
    """The kernel for x [rows, K]; None: through the dense weight.

    tiles: K / 64, rounded up with each group's padding.
    """
    strips = math.ceil(out_features / STRIP)
    if rows <= _SKINNY:
        found = [
            Plan(*kernel, warps)
            for kernel, warps in itertools.product(_SKINNY_COSTS, (4, 8, 16))
            if (kernel[1] > 1) == (rows > 8) and fits(Plan(*kernel, warps), tiles, bits, gpu.shared_bytes)
        ]
        return min(found, key=lambda how: _skinny_cost(how, strips, tiles, gpu))
    if rows > _WIDE.get(gpu.capability[0], _WIDE_ELSE):
        return None
    found = [
        Plan(0, tokens, splits=splits)
        for tokens, splits in itertools.product(reversed(_WIDE_COSTS), range(1, _most_splits(tiles) + 1))
        if _wide_bytes(bits, tokens, gpu.shared_bytes) <= gpu.shared_bytes
    ]  # none: 8 bits on Turing
    return min(found, key=lambda how: _wide_cost(how, rows, strips, tiles, gpu), default=None)


def _skinny_cost(how: Plan, strips: int, tiles: int, gpu: Gpu) -> float:
    """Instructions on the multiprocessor with the most blocks; more where its warps are too few to keep it busy."""
    share = math.ceil(strips / how.strips / gpu.processors)
    of_warp = math.ceil(tiles / how.warps) * how.strips * _SKINNY_COSTS[how.strips, how.tokens] + _BESIDE
    return share * how.warps * of_warp / min(1, share * how.warps / _BUSY)


def _wide_cost(how: Plan, rows: int, strips: int, tiles: int, gpu: Gpu) -> float:
    """Instructions on the multiprocessor with the most blocks, of one of a block's warps."""
    blocks = math.ceil(strips / _WIDE_STRIPS) * math.ceil(rows / (how.tokens * 8)) * how.splits
    of_block = math.ceil(tiles / _STAGE_TILES / how.splits) * _WIDE_COSTS[how.tokens] + _BESIDE_WIDE
    return math.ceil(blocks / gpu.processors) * of_block * (1 + _SPLIT_COST * (how.splits - 1))


def _most_splits(tiles: int) -> int:
    """Every split has a whole stage, if there is one."""
    return max(1, min(16, tiles // _STAGE_TILES))


def _wide_bytes(bits: int, tokens: int, shared_bytes: int) -> int:
    """Shared memory of a block of the wide kernel: its stages of activations and weights (device/arguments.h)."""
    stage = tokens * 8 * _STAGE_TILES * 64 * 2 + bits * _WIDE_STRIPS * _STAGE_TILES * 64 * STRIP // 8
    usable = 99 << 10 if shared_bytes >= 99 << 10 else 64 << 10
    return stage * max(2, min(4, usable // stage))


def fits(how: Plan | None, tiles: int, bits: int, shared_bytes: int) -> bool:
    """Whether there is such a kernel, and it can run so with weights of these sizes; see :func:`plan` and Gpu."""
    if how is None:
        return True
    if how.strips:
        kernel = (how.strips, how.tokens)
        warps = (*range(1, 9), 16) if kernel == (1, 1) else range(1, 9)  # more would want too many registers
        return kernel in _SKINNY_COSTS and how.warps in warps and how.splits == 1
    whole = how.tokens in _WIDE_COSTS and how.warps == 8 and 1 <= how.splits <= _most_splits(tiles)
    return whole and _wide_bytes(bits, how.tokens, shared_bytes) <= shared_bytes


def candidates(rows: int, tiles: int, bits: int, shared_bytes: int) -> list[Plan | None]:
    """Plans worth trying for so many rows; None is the way through the dense weight. See :func:`plan` and Gpu."""
    found: list[Plan | None] = [None]
    if rows <= 64:
        found += [Plan(*kernel, warps) for kernel, warps in itertools.product(_SKINNY_COSTS, (2, 4, 8, 16))]
    splits = (1, 2, 3, 4, 6, 8, 12, 16)
    found += [Plan(0, tokens, splits=count) for tokens, count in itertools.product(_WIDE_COSTS, splits)]
    return [how for how in found if fits(how, tiles, bits, shared_bytes)]


@functools.cache
def gpu(device: torch.device) -> Gpu:
    """The device."""
    if device.type == "cpu":  # the emulator of the tests
        return Gpu(4, 227 << 10, (8, 0))
    properties = torch.cuda.get_device_properties(device)
    # torch < 2.7 does not tell: what every architecture but 7.5 has.
    limit = getattr(properties, "shared_memory_per_block_optin", 64 << 10 if properties.major < 8 else 99 << 10)
    return Gpu(properties.multi_processor_count, limit, (properties.major, properties.minor))
