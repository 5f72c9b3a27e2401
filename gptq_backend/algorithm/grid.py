"""The grid that a group of weights is rounded to: a scale and a zero for each output channel."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import QuantizeConfig

SCALE_DTYPE = torch.float16  # as stored; scales are rounded to it before anything is optimised against them


@dataclass(frozen=True)
class Grid:
    """A uniform grid per output channel. All fields [..., N]."""

    scale: Tensor  # not 0, representable in the stored dtype
    zero: Tensor  # an integer in [0, 2**bits)
    low: Tensor  # the least code - zero
    high: Tensor  # the greatest

    def map(self, function: Callable[[Tensor], Tensor]) -> Grid:
        return Grid(function(self.scale), function(self.zero), function(self.low), function(self.high))

    def round(self, values: Tensor, centred: Tensor, error: Tensor) -> None:
        """values [..., N]: write code - zero to ``centred`` and value - dequantized value to ``error``."""
        torch.div(values, self.scale, out=centred).round_()
        torch.clamp(centred, self.low, self.high, out=centred)
        torch.addcmul(values, centred, self.scale, value=-1, out=error)


def min_max_grid(low: Tensor, high: Tensor, config: QuantizeConfig) -> Grid:
    """Min-max grid over [low, high], rounded to what is stored. A group of zeros gets scale 1."""
    max_code = (1 << config.bits) - 1
    scale = (high - low) / max_code
    info = torch.finfo(SCALE_DTYPE)
    smallest = info.smallest_normal * info.eps  # subnormal: coarse, but the codes are fitted to what is stored
    scale = torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=smallest))
    scale = scale.to(SCALE_DTYPE).to(low.dtype)
    if config.sym:
        zero = torch.full_like(scale, 1 << (config.bits - 1))
    else:
        zero = torch.div(-low, scale).round_().clamp_(0, max_code)
    return Grid(scale, zero, -zero, max_code - zero)
