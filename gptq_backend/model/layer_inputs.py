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
from ..distributed.team import Team, as_tensor, from_tensor
from ..timing import timed
from .hessian_sums import add_up
from .placement import Placement
from .structure import Target, dense_weight
from .token_weights import without_ones

logger = logging.getLogger(__name__)


def tells(mask: Tensor, rows: torch.Size) -> bool:
    """Whether a mask [B, T] has an entry for each of the rows of a tensor [*rows, K]."""
    return without_ones(rows) in (without_ones(mask.shape), [mask.numel()])


@dataclass(frozen=True, eq=False)
class LayerInput:
    """What one calibration batch feeds a layer."""

    number: int  # of the batch
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
    """A factor, its Hessian, and the input tensors (one per batch of this rank) that they were made from."""

    inputs: list[weakref.ref[Tensor]]
    serial: int  # of the Hessian: the same on all ranks
    weighted: bool
    settings: tuple[Any, ...]
    factor: LayerFactor
    hessian: Hessian

    @property
    def alive(self) -> bool:
        """Whether a layer may still read one of the inputs on this rank."""
        return any(ref() is not None for ref in self.inputs)

    def made_from(self, inputs: list[LayerInput]) -> bool:
        return len(inputs) == len(self.inputs) and all(ref() is each.x for ref, each in zip(self.inputs, inputs))


class Factors:
    """Those of the inputs that are still alive; the batches are those of all ranks of a team."""

    def __init__(self, placement: Placement, team: Team) -> None:
        self._placement, self.team = placement, team
        self._entries: list[InputFactor] = []
        self._made = 0

    def clear(self) -> None:
        self._entries.clear()

    def of(self, target: Target, inputs: list[LayerInput]) -> InputFactor | None:
        """The factor of a layer's input, if an earlier layer read the same tensors the one made for it; None if there
        was no token. ``inputs`` are those of this rank's batches.

        Raises:
            CalibrationError: all tokens were non-finite.
        """
        seen = _Seen.by_all(self.team, self._entries, inputs)
        self._entries = [entry for entry in self._entries if entry.serial in seen.alive]
        config = target.config
        order = (config.group_size, config.desc_act, config.static_groups, config.group_aware)  # see column_order
        settings = (*order, config.damp_percent)
        same = [each for each in self._entries if each.serial in seen.matching and each.weighted == seen.weighted]
        for entry in same:
            if entry.settings == settings:
                return entry
        if same:
            hessian, serial = same[0].hessian, same[0].serial
        else:
            channels = dense_weight(target.module).shape[1]
            place = self._placement.device or dense_weight(target.module).device
            hessian, serial = _accumulate(inputs, seen, channels, place, self.team), self._made
            self._made += 1
        self._placement.park([each.x for each in inputs])
        if hessian.dropped:
            logger.warning("%s: dropped %d tokens with NaN or infinite inputs", target.name, hessian.dropped)
        matrix = hessian.matrix(target.name)
        if not hessian.tokens:
            return None
        factor = prepare_factor(matrix, config, hessian.tokens, self.team.work)
        refs = [weakref.ref(each.x) for each in inputs]
        shared = InputFactor(refs, serial, seen.weighted, settings, factor, hessian)
        self._entries.append(shared)
        return shared


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the ranks of a team know together of a layer's input."""

    alive: set[int]  # serials of Hessians whose inputs live on
    matching: set[int]  # of those that were made from this input
    dtype: torch.dtype  # of the Hessian
    weighted: bool
    mean: Tensor | None  # of the token weights; None if they tell nothing

    @classmethod
    def by_all(cls, team: Team, entries: list[InputFactor], inputs: list[LayerInput]) -> _Seen:
        matching = [entry.serial for entry in entries if entry.made_from(inputs)]
        alive = [entry.serial for entry in entries if entry.alive]
        facts = [str(torch.promote_types(each.x.dtype, torch.float32)) for each in inputs[:1]]
        weights = [weights.flatten() for _, weights in (each.used() for each in inputs) if weights is not None]
        found = team.all_gather([as_tensor([matching, alive, facts]), *weights])
        said = [from_tensor(told) for told, *_ in found]
        of_all = [set(matching) for matching, _, facts in said if facts]  # a rank without inputs knows nothing
        dtypes = [getattr(torch, facts[0].removeprefix("torch.")) for *_, facts in said if facts]
        told = [each for _, *rest in found for each in rest]
        return cls(
            alive={serial for _, alive, _ in said for serial in alive},
            matching=set.intersection(*of_all) if of_all else set(),
            dtype=dtypes[0] if dtypes else torch.float32,
            weighted=bool(told),
            mean=_mean(told) if told else None,
        )


@timed("hessian")
def _accumulate(inputs: list[LayerInput], seen: _Seen, channels: int, device: torch.device, team: Team) -> Hessian:
    """The Hessian of all ranks' inputs, of which this one has some."""
    first = inputs[0].number if inputs else 0
    hessian = Hessian(channels, seen.dtype, device, first)
    for each in inputs:
        x, weights = each.used()
        if seen.mean is None or weights is None:
            hessian.add(x, None, each.number)
        else:
            hessian.add(x, (weights / seen.mean.to(weights.device)).nan_to_num_(nan=1.0, posinf=1.0), each.number)
    add_up(hessian, team)
    return hessian


def _mean(weights: list[Tensor]) -> Tensor | None:
    """Of the finite entries; None if they are all 0. A NaN at one token makes those of its whole sequence NaN."""
    joined = torch.cat([each.flatten() for each in weights])
    mean = joined[joined.isfinite()].mean()
    return mean if mean > 0 else None
