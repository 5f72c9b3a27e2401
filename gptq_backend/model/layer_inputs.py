"""One Hessian and one factor per distinct input, however many layers read it."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..algorithm.drift import CrossMoment, Drift, make_up, prepare_solver
from ..algorithm.gptq import LayerFactor, prepare_factor
from ..algorithm.hessian import Factor, Hessian
from ..algorithm.sharing import Sharing, alone
from ..config import QuantizeConfig
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
    original: Tensor | None = None  # like x: what the original model feeds the layer
    residual: tuple[Tensor, Tensor] | None = None  # [B, T, N]: what its output is added to, in the original and here

    def used(self) -> tuple[Tensor, Tensor | None]:
        """x and weights without padding; shapes that do not tell where it is pass whole."""
        return self._kept(self.x), None if self.weights is None else self._kept(self.weights.reshape(self.x.shape[:-1]))

    def drift(self) -> Tensor | None:
        """What x lacks to the original's, without padding; None where that is not known."""
        return self._difference(self.original, self.x)

    def output_drift(self, weight: Tensor) -> Tensor | None:
        """What the sum of the output of a layer [N, K] and of what it is added to lacks to the original's, likewise."""
        drift = self.drift()
        residual = None if self.residual is None else self._difference(*self.residual)
        return None if drift is None or residual is None else residual.add_(drift @ weight.t().to(drift))

    def _difference(self, original: Tensor | None, here: Tensor) -> Tensor | None:
        if original is None or original.shape != here.shape or here.shape[:-1] != self.x.shape[:-1]:
            return None
        wide = torch.promote_types(here.dtype, torch.float32)
        return self._kept((original.to(here.device, wide) - here.to(wide)).to(self.x))

    def _kept(self, values: Tensor) -> Tensor:
        """Without padding: values [B, T, ...] or with other rows, as x has them."""
        rows = self.x.shape[:-1]
        if self.mask is None or not tells(self.mask, rows):
            return values
        return values[self.mask.bool().reshape(rows)]


@dataclass(frozen=True, eq=False)
class InputFactor:
    """A factor, its Hessian, and the input tensors (one per batch of this rank) that they were made from."""

    inputs: list[weakref.ref[Tensor]]
    serial: int  # of the Hessian: the same on all ranks
    weighted: bool
    settings: tuple[Any, ...]
    factor: LayerFactor
    hessian: Hessian
    solver: Factor | None = None  # for the drift; None if nothing is known of it
    drift: Drift | None = None  # likewise

    def aim(self, weight: Tensor, sharing: Sharing = alone) -> Tensor:
        """The weight [N, K] to round in the place of a layer's own; ``sharing`` makes parts of it."""
        if self.solver is None or self.drift is None:
            return weight
        return make_up(weight, self.factor.hessian, self.solver, self.drift, sharing)

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
        self._drifts: dict[int, Drift | None] = {}  # of inputs, by the serial of their Hessian
        self._solvers: dict[int, Factor] = {}  # likewise
        self._made = 0

    def clear(self) -> None:
        self._entries.clear()
        self._drifts.clear()
        self._solvers.clear()

    def of(self, target: Target, inputs: list[LayerInput]) -> InputFactor | None:
        """The factor of a layer's input, if an earlier layer read the same tensors the one made for it; None if there
        was no token. ``inputs`` are those of this rank's batches.

        Raises:
            CalibrationError: all tokens were non-finite.
        """
        seen = _Seen.by_all(self.team, self._entries, inputs)
        self._entries = [entry for entry in self._entries if entry.serial in seen.alive]
        for known in (self._drifts, self._solvers):
            for serial in known.keys() - seen.alive:
                del known[serial]
        same = [each for each in self._entries if each.serial in seen.matching and each.weighted == seen.weighted]
        weight = dense_weight(target.module).detach()
        device = self._placement.device or weight.device
        if same:
            hessian, serial = same[0].hessian, same[0].serial
        else:
            hessian, serial = _accumulate(inputs, seen, weight.shape[1], device, self.team), self._made
            self._made += 1
        drift = self._drift(inputs, seen, weight, serial, device)
        settings = _settings(target.config)
        found = next((entry for entry in same if entry.settings == settings), None)
        if found is None:
            self._placement.park([each.x for each in inputs])
            factor = self._prepare(target, hessian)
            if factor is None:
                return None
            refs = [weakref.ref(each.x) for each in inputs]
            found = InputFactor(refs, serial, seen.weighted, settings, factor, hessian)
            self._entries.append(found)
        if drift is None:
            return found
        if serial not in self._solvers:
            self._solvers[serial] = self._prepare_solver(found)
        return replace(found, solver=self._solvers[serial], drift=drift)

    def _drift(
        self, inputs: list[LayerInput], seen: _Seen, weight: Tensor, serial: int, device: torch.device
    ) -> Drift | None:
        """Of the layer's output if that is added to a residual, otherwise of its input, once for all layers that read
        the same.
        """
        if not seen.drifts:
            return None
        rows, channels = weight.shape

        def accumulate(drift_of: Callable[[LayerInput], Tensor | None], rows: int, of_output: bool) -> Drift | None:
            return _accumulate_drift(inputs, drift_of, seen, (rows, channels), device, self.team, of_output)

        found = accumulate(lambda each: each.output_drift(weight), rows, True)
        if found is not None:
            return found
        if serial not in self._drifts:
            self._drifts[serial] = accumulate(LayerInput.drift, channels, False)
        return self._drifts[serial]

    @timed("factor")
    def _prepare_solver(self, found: InputFactor) -> Factor:
        return prepare_solver(found.factor, found.hessian.tokens, self.team.work)

    def _prepare(self, target: Target, hessian: Hessian) -> LayerFactor | None:
        if hessian.dropped:
            logger.warning("%s: dropped %d tokens with NaN or infinite inputs", target.name, hessian.dropped)
        matrix = hessian.matrix(target.name)
        return prepare_factor(matrix, target.config, hessian.tokens, self.team.work) if hessian.tokens else None


def _settings(config: QuantizeConfig) -> tuple[Any, ...]:
    """All that a factor depends on, beside the Hessian; see column_order."""
    return config.group_size, config.desc_act, config.static_groups, config.group_aware, config.damp_percent


@dataclass(frozen=True, eq=False)
class _Seen:
    """What the ranks of a team know together of a layer's input."""

    alive: set[int]  # serials of Hessians whose inputs live on
    matching: set[int]  # of those that were made from this input
    dtype: torch.dtype  # of the Hessian
    weighted: bool
    mean: Tensor | None  # of the token weights; None if they tell nothing
    drifts: bool  # whether anything is known of what the original model feeds the layer

    @classmethod
    def by_all(cls, team: Team, entries: list[InputFactor], inputs: list[LayerInput]) -> _Seen:
        matching = [entry.serial for entry in entries if entry.made_from(inputs)]
        alive = [entry.serial for entry in entries if entry.alive]
        facts = [str(torch.promote_types(each.x.dtype, torch.float32)) for each in inputs[:1]]
        weights = [weights.flatten() for _, weights in (each.used() for each in inputs) if weights is not None]
        drifts = any(each.original is not None for each in inputs)
        found = team.all_gather([as_tensor([matching, alive, facts, drifts]), *weights])
        said = [from_tensor(told) for told, *_ in found]
        of_all = [set(matching) for matching, _, facts, _ in said if facts]  # a rank without inputs knows nothing
        dtypes = [getattr(torch, facts[0].removeprefix("torch.")) for _, _, facts, _ in said if facts]
        told = [each for _, *rest in found for each in rest]
        return cls(
            alive={serial for _, alive, *_ in said for serial in alive},
            matching=set.intersection(*of_all) if of_all else set(),
            dtype=dtypes[0] if dtypes else torch.float32,
            weighted=bool(told),
            mean=_mean(told) if told else None,
            drifts=any(drifts for *_, drifts in said),
        )

    def relative(self, weights: Tensor | None) -> Tensor | None:
        """Token weights, 1 on average over all ranks' batches."""
        if self.mean is None or weights is None:
            return None
        return (weights / self.mean.to(weights.device)).nan_to_num_(nan=1.0, posinf=1.0)


@timed("hessian")
def _accumulate(inputs: list[LayerInput], seen: _Seen, channels: int, device: torch.device, team: Team) -> Hessian:
    """The Hessian of all ranks' inputs, of which this one has some."""
    first = inputs[0].number if inputs else 0
    hessian = Hessian(channels, seen.dtype, device, first)
    for each in inputs:
        x, weights = each.used()
        hessian.add(x, seen.relative(weights), each.number)
    add_up(hessian, team)
    return hessian


@timed("drift")
def _accumulate_drift(
    inputs: list[LayerInput],
    drift_of: Callable[[LayerInput], Tensor | None],
    seen: _Seen,
    shape: tuple[int, ...],
    device: torch.device,
    team: Team,
    of_output: bool,
) -> Drift | None:
    """The moments [M, K] of drifts [..., M] with all ranks' inputs [..., K], from the batches of even and of odd
    numbers; None where one is not known.
    """
    first = inputs[0].number if inputs else 0
    halves = [CrossMoment(shape[0], shape[1], seen.dtype, device, (first + 1 - odd) // 2) for odd in range(2)]
    for each in inputs:
        if (drift := drift_of(each)) is not None:
            x, weights = each.used()
            halves[each.number % 2].add(each.number // 2, drift, x, seen.relative(weights))
    for moment in halves:
        add_up(moment, team)
    matrices = [matrix for moment in halves if (matrix := moment.matrix()) is not None]
    if len(matrices) < len(halves):
        return None
    return Drift(torch.stack(matrices), (halves[0].tokens, halves[1].tokens), of_output)


def _mean(weights: list[Tensor]) -> Tensor | None:
    """Of the finite entries; None if they are all 0. A NaN at one token makes those of its whole sequence NaN."""
    joined = torch.cat([each.flatten() for each in weights])
    mean = joined[joined.isfinite()].mean()
    return mean if mean > 0 else None
