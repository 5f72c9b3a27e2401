"""What readers of other tools' layouts share: what they say of a layer, and how they refuse one."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config_fields import held_bits
from ..errors import CheckpointError
from .headers import TensorInfo, read_tensor
from .stored_tensors import check_groups

Parts = Mapping[str, TensorInfo]  # of one layer, by what its tool calls them
FLOATS = (torch.float16, torch.bfloat16, torch.float32)
INDICES = (torch.int32, torch.int64, torch.int16)


@dataclass(frozen=True)
class LayerShape:
    """A layer without its values.

    Args:
        in_features, out_features, groups, group_size: K, N, G, and channels per group.
        stored_bits: width of a code in the file.
        scales_dtype: of the file.
        act_order: it has an order of its own, hence a ``g_idx``.
        sym: None where only the values tell.
        gaps: each word holds whole codes only, hence has unused bits where their width does not divide 32.
    """

    in_features: int
    out_features: int
    groups: int
    group_size: int
    stored_bits: int = 4
    scales_dtype: torch.dtype = torch.float16
    act_order: bool = False
    sym: bool | None = None
    gaps: bool = False

    @property
    def bits(self) -> int:
        """Width of a code in memory, which holds the same numbers."""
        return held_bits(self.stored_bits)


def group_size(name: str, features: int, groups: int) -> int:
    """Channels per group of contiguous ones, all of one size.

    Raises:
        CheckpointError: no size makes that many.
    """
    if features % groups:
        raise CheckpointError(
            f"{name} has {groups} groups for {features} inputs, expected groups of one size; fetch the checkpoint "
            "again or export it anew"
        )
    return features // groups


def require(name: str, layout: str, parts: Parts, dtypes: Mapping[str, Collection[torch.dtype]]) -> None:
    """Refuse a layer that lacks a part, or has one that is no matrix of the right type.

    Args:
        dtypes: those that are allowed, by part.

    Raises:
        CheckpointError: with the layer's name.
    """
    for part, allowed in dtypes.items():
        if part not in parts:
            raise CheckpointError(
                f"{name}: {part} is missing, expected {', '.join(dtypes)} in the layout of {layout}; fetch the "
                "checkpoint again or export it anew"
            )
        info = parts[part]
        if info.dtype not in allowed or len(info.shape) != 2 or 0 in info.shape:
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
            raise CheckpointError(
                f"{name}.{part} is {info.dtype} of shape {list(info.shape)}, expected a matrix of {expected} in the "
                f"layout of {layout}; fetch the checkpoint again or export it anew"
            )


def read_order(name: str, part: str, info: TensorInfo, features: int, groups: int) -> Tensor:
    """int32 [K]: the group of each input channel.

    Raises:
        CheckpointError: it is no vector of that many integers, or names groups that do not exist.
    """
    if info.dtype not in INDICES or info.shape != (features,):
        raise CheckpointError(
            f"{name}.{part} is {info.dtype} of shape {list(info.shape)}, expected integers of shape {[features]}; "
            "fetch the checkpoint again or export it anew"
        )
    order = read_tensor(info).long()
    check_groups(f"{name}.{part}", order, groups)
    return order.int()


def require_shapes(name: str, layout: str, parts: Parts, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Raises CheckpointError where a part has another shape."""
    for part, expected in shapes.items():
        if parts[part].shape != expected:
            raise CheckpointError(
                f"{name}.{part} has shape {list(parts[part].shape)}, expected {list(expected)} in the layout of "
                f"{layout}; fetch the checkpoint again or export it anew"
            )
