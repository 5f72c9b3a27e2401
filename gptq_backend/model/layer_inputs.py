"""One Hessian and one factor per distinct input, however many layers read it."""

from __future__ import annotations

import logging
import weakref
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..algorithm.gptq import LayerFactor, prepare_factor
from ..algorithm.hessian import Hessian
from ..timing import timed
from .placement import Placement
from .structure import Target
from .token_weights import without_ones

logger = logging.getLogger(__name__)


def tells(mask: Tensor, rows: torch.Size) -> bool:
    """Whether a mask [B, T] has an entry for each of the rows of a tensor [*rows, K]."""
    return without_ones(rows) in (without_ones(mask.shape), [mask.numel()])


@dataclass(frozen=True, eq=False)
class LayerInput:
    """What one calibration batch feeds a layer."""

    x: Tensor  # [B, T, K] or another shape that ends in K
    mask: Tensor | None  # [B, T], 0 marks padding; None if nothing is padded
    weights: Tensor | None  # [B, T], what each token counts (token_weights.py); None: as much as an average one

    def used(self) -> tuple[Tensor, Tensor | None]:
        """x and weights without padding; shapes that do not tell where it is pass whole."""
        rows = self.x.shape[:-1]
        if self.mask is None or not tells(self.mask, rows):
            return self.x, self.weights
        keep = self.mask.bool().reshape(rows)
        return self.x[keep], None if self.weights is None else self.weights.reshape(rows)[keep]


@dataclass(frozen=True, eq=False)
class InputFactor:
    """A factor, its Hessian, and the input tensors (one per batch) that they were made from."""

    inputs: list[weakref.ref[Tensor]]
    weighted: bool
    settings: tuple[Any, ...]
    factor: LayerFactor
    hessian: Hessian

    def made_from(self, inputs: list[LayerInput], weighted: bool) -> bool:
        same = weighted == self.weighted and len(inputs) == len(self.inputs)
        return same and all(ref() is each.x for ref, each in zip(self.inputs, inputs))


class Factors:
    """Those of the inputs that are still alive."""

    def __init__(self, placement: Placement) -> None:
        self._placement = placement
        self._entries: list[InputFactor] = []

    def clear(self) -> None:
        self._entries.clear()

    def of(self, target: Target, inputs: list[LayerInput]) -> InputFactor | None:
        """The factor of a layer's input, if an earlier layer read the same tensors the one made for it; None if there
        was no token.

        Raises:
            CalibrationError: all tokens were non-finite.
        """
        self._entries = [entry for entry in self._entries if any(ref() is not None for ref in entry.inputs)]
        config, weighted = target.config, any(each.weights is not None for each in inputs)
        order = (config.group_size, config.desc_act, config.static_groups, config.group_aware)  # see column_order
        settings = (*order, config.damp_percent)
        same_input = [entry for entry in self._entries if entry.made_from(inputs, weighted)]
        for entry in same_input:
            if entry.settings == settings:
                return entry
        hessian = same_input[0].hessian if same_input else _accumulate(inputs, weighted)
        self._placement.park([each.x for each in inputs])
        if hessian.dropped:
            logger.warning("%s: dropped %d tokens with NaN or infinite inputs", target.name, hessian.dropped)
        matrix = hessian.matrix(target.name)
        if not hessian.tokens:
            return None
        factor = prepare_factor(matrix, config, hessian.tokens)
        shared = InputFactor([weakref.ref(each.x) for each in inputs], weighted, settings, factor, hessian)
        self._entries.append(shared)
        return shared


@timed("hessian")
def _accumulate(inputs: list[LayerInput], weighted: bool) -> Hessian:
    first = inputs[0].x
    hessian = Hessian(first.shape[-1], torch.promote_types(first.dtype, torch.float32), first.device)
    used = [each.used() for each in inputs]
    mean = _mean([weights for _, weights in used if weights is not None]) if weighted else None
    for x, weights in used:
        if mean is None or weights is None:
            hessian.add(x)
        else:
            hessian.add(x, (weights / mean).nan_to_num_(nan=1.0, posinf=1.0))
    return hessian


def _mean(weights: list[Tensor]) -> Tensor | None:
    """Of the finite entries; None if they are all 0. A NaN at one token makes those of its whole sequence NaN."""
    joined = torch.cat([each.flatten() for each in weights])
    mean = joined[joined.isfinite()].mean()
    return mean if mean > 0 else None
