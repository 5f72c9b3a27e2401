"""Layers that AutoGPTQ serialized in the order in which the Marlin kernel reads them: 4 bits, symmetric.

``B`` int32 [K/16, 2N] holds tiles of 16 x 16 codes, four tiles to a run of 1024, permuted as the tensor cores' threads
want them; ``s`` float16 [G, N] holds the scales, permuted too. See the IST-DASLab/marlin paper, section 3.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache

import torch
from torch import Tensor

from ..config import QuantizeConfig
from ..errors import CheckpointError
from . import packing
from .layout import LayerShape, Parts, group_size, require, require_shapes
from .weight import QuantizedWeight

LAYOUT, BITS = "Marlin", 4
_TILE, _RUN = 16, 1024
_FLOAT16 = (torch.float16,)


def matches(parts: Parts, config: QuantizeConfig) -> bool:
    return len(parts["B"].shape) == 2 and parts["B"].dtype == torch.int32  # a name that other tensors may have, too


def shape(name: str, parts: Parts, config: QuantizeConfig) -> LayerShape:
    require(name, LAYOUT, parts, {"B": (torch.int32,), "s": _FLOAT16})
    features = parts["B"].shape[0] * _TILE
    groups, out_features = parts["s"].shape
    require_shapes(name, LAYOUT, parts, {"B": (features // _TILE, 2 * out_features)})
    if out_features % 64:
        raise CheckpointError(f"{name}.s has {out_features} columns, expected a multiple of 64 in Marlin's layout")
    return LayerShape(features, out_features, groups, group_size(name, features, groups), BITS, sym=True)


def read(name: str, tensors: Mapping[str, Tensor], shape: LayerShape) -> QuantizedWeight:
    features, out_features, groups = shape.in_features, shape.out_features, shape.groups
    tiles, order = features // _TILE, _order_of_codes()
    stored = packing.unpack(tensors["B"].t().contiguous(), BITS, out_features * _TILE).t()
    runs = stored.reshape(-1, _RUN)
    codes = torch.empty_like(runs)
    codes[:, order] = runs
    codes = codes.view(tiles, out_features // _TILE, _TILE, _TILE).permute(0, 2, 1, 3).reshape(features, out_features)
    columns = _order_of_scales(groups > 1)
    runs = tensors["s"].reshape(-1, len(columns))
    scales = torch.empty_like(runs)
    scales[:, columns] = runs
    zeros = torch.full((groups, out_features), 1 << (BITS - 1), dtype=torch.uint8)
    g_idx = torch.arange(features, dtype=torch.int32) // shape.group_size
    return QuantizedWeight(codes, scales.view(groups, out_features), zeros, g_idx, BITS)


@cache
def _order_of_codes() -> Tensor:
    """int64 [1024]: of four tiles side by side, which code lies in each place.

    A thread of a warp takes two rows of a tile, and the two eight rows below, of the columns ``thread // 4`` and eight
    further: eight codes of each of four tiles. The two halves of a word come interleaved, as a 16-bit pair is taken
    out of it at once.
    """
    order = []
    for thread in range(32):
        column, row = thread // 4, 2 * (thread % 4)
        rows = (row, row + 1, row + 8, row + 9)
        own = [_TILE * r + column + 8 * half for half in (0, 1) for r in rows]
        order += [code + _TILE * _TILE * tile for tile in range(4) for code in own]
    interleaved = [0, 2, 4, 6, 1, 3, 5, 7]
    return torch.tensor(order).view(-1, 8)[:, interleaved].reshape(-1)


@cache
def _order_of_scales(grouped: bool) -> Tensor:
    """int64 [64] or [32]: of so many neighbours, which scale lies in each place."""
    if grouped:
        return torch.arange(64).view(8, 8).t().reshape(-1)
    return torch.tensor([2 * i + j for i in range(4) for j in (0, 1, 8, 9, 16, 17, 24, 25)])
