"""How the Triton kernels cut a product: tiles, splits of K, and what suits which GPU."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass

import torch

from ..devices import cdiv
from .layout import PLANE, planes


@dataclass(frozen=True)
class Tile:
    """How a product is cut: rows and columns of y of one program, its warps, and loads in flight.

    A tile of one row is multiplied without matrix units; others have 16 rows or more.
    """

    rows: int
    columns: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Heuristics:
    """What suits an architecture. Estimates, not measured: see docs/kernels.md.

    Args:
        tiles: by rows, ascending; the first with enough rows is taken, else the last.
        programs: wanted per multiprocessor; K is split to reach it.
        dense_rows: from so many rows on, the weight is dequantized for the vendor's matrix product.
    """

    tiles: tuple[Tile, ...]
    programs: int = 4
    dense_rows: int = 512


_AMPERE = (Tile(1, 128, 4, 3), Tile(16, 128, 4, 4), Tile(32, 128, 8, 4), Tile(64, 128, 8, 3))
HEURISTICS = {
    "sm_80": Heuristics(_AMPERE),
    "sm_90": Heuristics((*_AMPERE, Tile(128, 128, 8, 3))),
    "gfx942": Heuristics((Tile(1, 128, 4, 2), Tile(16, 64, 4, 2), Tile(32, 128, 4, 2), Tile(64, 128, 4, 2))),
    # A wave of 32 lanes, as Radeon cards have, needs twice the registers of one of 64: smaller tiles, or more waves.
    "gfx1100": Heuristics((Tile(1, 64, 4, 2), Tile(16, 64, 4, 2), Tile(32, 128, 8, 2), Tile(64, 128, 8, 2))),
    "xpu": Heuristics((Tile(1, 64, 4, 2), Tile(16, 64, 4, 2), Tile(32, 64, 8, 2), Tile(64, 128, 16, 2))),
}


@dataclass(frozen=True)
class Machine:
    """A device: what suits it, its multiprocessors, and bytes of shared memory that a program can have."""

    heuristics: Heuristics
    processors: int
    shared: int


@functools.cache
def machine(device: torch.device) -> Machine:
    """What there is to know of ``device`` for a plan."""
    if device.type == "cpu":  # Triton's interpreter
        return Machine(HEURISTICS["sm_80"], 2, 160 << 10)
    if device.type == "xpu":
        xpu = torch.xpu.get_device_properties(device)
        return Machine(HEURISTICS["xpu"], xpu.max_compute_units, xpu.local_mem_size)
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        name = "gfx942" if properties.warp_size == 64 else "gfx1100"
        return Machine(HEURISTICS[name], properties.multi_processor_count, 64 << 10)
    shared = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    heuristics = HEURISTICS["sm_90" if properties.major in (9, 10) else "sm_80"]
    return Machine(heuristics, properties.multi_processor_count, shared)


@functools.cache
def fitting_tiles(bits: int, itemsize: int, device: torch.device) -> tuple[Tile, ...]:
    """The heuristics' tiles, with as many stages as fit into shared memory. itemsize: bytes of an element of x."""
    gpu, slots = machine(device), planes(bits) * PLANE
    tiles = []
    for tile in gpu.heuristics.tiles:
        stage = slots * (tile.columns * bits // 8 + tile.rows * itemsize)
        if stages := min(tile.stages, gpu.shared // stage):
            tiles.append(dataclasses.replace(tile, stages=stages))
    return tuple(tiles)


@functools.cache
def plan(rows: int, columns: int, slabs: int, bits: int, itemsize: int, device: torch.device) -> tuple[Tile, int]:
    """Tile for y [rows, columns], and how many programs share each sum over K."""
    tiles = fitting_tiles(bits, itemsize, device)
    tile = next((tile for tile in tiles if tile.rows >= rows), tiles[-1])
    return tile, splits(cdiv(rows, tile.rows) * cdiv(columns, tile.columns), slabs, device)


def moe_rows(rows: int, experts: int, device: torch.device) -> int:
    """Rows of a block for a grouped product. rows: of y, in all."""
    tiles = [tile for tile in fitting_tiles(3, 4, device) if tile.rows > 1]  # those that fit for all bits and dtypes
    return next((tile.rows for tile in tiles if tile.rows >= rows / experts), tiles[-1].rows)


def splits(programs: int, slabs: int, device: torch.device) -> int:
    """How many programs share a sum. programs: as many as there would be without splitting."""
    gpu = machine(device)
    wanted = gpu.heuristics.programs * gpu.processors // programs
    return cdiv(slabs, cdiv(slabs, min(max(wanted, 1), slabs)))  # none without a slab
