"""GPTQ for one linear layer: fit a grid per group, round column by column, push each error onto what is left.

Notation follows Frantar et al. (arXiv 2210.17323): H the Hessian, U the upper Cholesky factor of its inverse, q the
rounded column. docs/algorithm.md maps the paper's equations to these lines.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from ..config import QuantizeConfig
from ..errors import CalibrationError
from ..format.weight import QuantizedWeight
from ..timing import timed
from .column_order import ColumnOrder, column_order
from .columns import round_columns
from .grid import SCALE_DTYPE, Grid
from .hessian import Factor, damping, factor
from .refine import refine
from .row_feedback import RowFactor, in_turns
from .scale_search import fit_grid
from .sharing import Sharing, alone

_PANEL = 128  # columns between two updates of the rest of the matrix
# Output channels that are rounded together, about: what a core's cache holds, and what keeps a GPU busy.
_CPU_ROWS, _GPU_ROWS = 384, 4096


@dataclass(frozen=True)
class LayerFactor:
    """What the column loop needs of one distinct input; layers that share the input share this."""

    order: ColumnOrder
    factor: Factor  # U in that order
    hessian: Tensor  # the undamped H in the original order; channels never excited have the median of the diagonal


@dataclass(frozen=True)
class Step:
    """One step of making a weight and the error that it left.

    That is the share of the layer's output energy on the calibration tokens that is error, each token counted as in the
    Hessian (see :class:`token_weights.Sensitivity`).
    """

    name: str  # "loop" or "sweep N"
    error: float


@dataclass(frozen=True)
class QuantizedLayer:
    """A quantized weight and what it costs.

    Args:
        weight: the result.
        loss: ``tr(D H D^T)`` for D = quantized - given weight, per calibration token and output channel, tokens
            counted as in H; without H the sum of D^2 per output channel.
        relative_loss: the same over ``tr(W H W^T)``: the share of the layer's output energy that is error, tokens
            counted as in H; without H of the weight's energy.
        steps: the relative loss after the column loop and after each refinement; empty if there was none. Where rows
            make up for each other's errors, measured against each row's moved target: less than ``relative_loss``.
    """

    weight: QuantizedWeight
    loss: float
    relative_loss: float
    steps: tuple[Step, ...] = ()


@timed("factor")
def prepare_factor(
    hessian: Tensor, config: QuantizeConfig, tokens: float = math.inf, sharing: Sharing = alone
) -> LayerFactor:
    """Order the columns and factor H [K, K] of so many tokens; fewer mean more damping (:func:`hessian.damping`).

    Channels that calibration never excited get the diagonal of a typical one. ``sharing`` does part of the factor.
    """
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    dead = diagonal <= 0
    diagonal[dead] = 1 if dead.all() else diagonal[~dead].median()
    order = column_order(diagonal, config)
    in_order = hessian[order.perm][:, order.perm].to(_working_dtype(hessian))
    damp = damping(config.damp_percent, len(hessian), tokens)
    return LayerFactor(order, factor(in_order, damp, sharing), hessian)


def _working_dtype(tensor: Tensor) -> torch.dtype:
    """float64 on a CPU, where it costs little: a float32 loop rounds near-ties the other way now and then, and the rest
    of that output channel is then another solution, on every machine a different one. GPUs lack the units for it. The
    ranking of finalists and the refinement are in float32, for speed: their near-ties can still fall either way.
    """
    return torch.float64 if tensor.device.type == "cpu" else torch.promote_types(tensor.dtype, torch.float32)


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    shared: LayerFactor | None,
    config: QuantizeConfig,
    tokens: int = 1,
    name: str = "layer",
    rounded: QuantizedWeight | None = None,
    sharing: Sharing = alone,
    rows: RowFactor | None = None,
) -> QuantizedLayer:
    """Quantize one weight.

    Args:
        weight: [N, K], any float type; the column loop runs in float64 on a CPU, all else at least in float32.
        shared: order and factor of the layer's input, or None to round to nearest without calibration.
        config: settings of this layer.
        tokens: calibration tokens behind the Hessian, to report the loss per token.
        name: the module, for messages.
        rounded: what :func:`round_weights` made of the weight, if it did.
        sharing: does the parts that :func:`row_parts` makes of the output channels.
        rows: if output channels are to make up for each other's errors, and nothing is ``rounded``. The loss is still
            ``tr(D H D^T)``, which this raises.

    Raises:
        CalibrationError: the weight is not finite, or too large for float16 scales.
    """
    if not weight.isfinite().all():
        raise CalibrationError(
            f"{name}.weight: has NaN or infinite entries; the model's file is damaged, fetch it again"
        )
    quantize = partial(_quantize_parts, shared=shared, config=config, sharing=sharing)
    quantized, sums = quantize(weight, rounded=rounded) if rows is None else in_turns(weight, rows, quantize)
    if not quantized.scales.isfinite().all():
        raise CalibrationError(f"{name}.weight: a scale overflows {SCALE_DTYPE}; skip the layer with a dynamic rule")
    loss, energy, *errors = sums.tolist()
    names = ("loop", *(f"sweep {number}" for number in range(1, len(errors))))
    steps = tuple(Step(name, _share(error, energy)) for name, error in zip(names, errors))
    if rows is not None:  # the sums are of what each row was to become
        loss, energy = _loss_and_energy(quantized, weight, shared)
    return QuantizedLayer(
        quantized,
        loss=loss / (max(tokens, 1) * weight.shape[0]),
        relative_loss=_share(loss, energy),
        steps=steps,
    )


def _share(error: float, energy: float) -> float:
    return error / energy if energy > 0 else 0.0


def row_parts(rows: int, device: torch.device) -> list[slice]:
    """How so many output channels are cut up, always in the same way: a matrix product of another shape may round
    otherwise.
    """
    together = _CPU_ROWS if device.type == "cpu" else _GPU_ROWS
    count = 1 << max(0, round(math.log2(rows / together)))
    return [slice(rows * i // count, rows * (i + 1) // count) for i in range(count)]


def _quantize_parts(
    weight: Tensor,
    shared: LayerFactor | None,
    config: QuantizeConfig,
    sharing: Sharing,
    rounded: QuantizedWeight | None = None,
) -> tuple[QuantizedWeight, Tensor]:
    """The output channels ``weight`` [n, K], part by part -> them, and the sums of :func:`_quantize_rows`, float64."""
    parts = row_parts(len(weight), weight.device)

    def part(i: int) -> list[Tensor]:
        given = None if rounded is None else rounded.rows(parts[i])
        found, sums = _quantize_rows(weight[parts[i]], shared, config, given)
        return [found.codes, found.scales, found.zeros, found.g_idx, torch.tensor(sums, dtype=torch.float64)]

    *fields, g_idx, sums = zip(*sharing(len(parts), part))
    codes, scales, zeros = (torch.cat(each, dim=1) for each in fields)
    total = torch.stack([each.cpu() for each in sums]).sum(0)
    return QuantizedWeight(codes, scales, zeros, g_idx[0], config.bits), total


def _quantize_rows(
    weight: Tensor, shared: LayerFactor | None, config: QuantizeConfig, rounded: QuantizedWeight | None
) -> tuple[QuantizedWeight, list[float]]:
    """The output channels ``weight`` [n, K] -> them, ``tr(D H D^T)``, ``tr(W H W^T)``, and what :func:`refine` tells;
    see :class:`QuantizedLayer`.
    """
    quantized = rounded or round_weights([weight], shared, config)[0]
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    errors: list[float] = []
    sweeps = config.preset.refine_sweeps
    if shared is not None and sweeps and shared.factor.method != "diagonal":
        if quantized.scales.isfinite().all():
            hessian = shared.hessian.to(weight.dtype)
            quantized, errors = refine(quantized, weight, hessian, shared.factor.damp_percent, sweeps)
        else:  # the caller refuses it
            errors = [math.inf] * (1 + sweeps)
    return quantized, [*_loss_and_energy(quantized, weight, shared), *errors]


def _loss_and_energy(quantized: QuantizedWeight, weight: Tensor, shared: LayerFactor | None) -> tuple[float, float]:
    """``tr(D H D^T)`` and ``tr(W H W^T)``; without H the sums of squares."""
    weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
    difference = quantized.dequantize(weight.dtype) - weight
    if shared is None:
        return float(difference.square().sum()), float(weight.square().sum())
    hessian = shared.hessian.to(weight.dtype)
    loss, energy = ((each @ hessian).mul_(each).sum() for each in (difference, weight))
    return float(loss), float(energy)


@torch.no_grad()
def round_weights(
    weights: Sequence[Tensor], shared: LayerFactor | None, config: QuantizeConfig, sharing: Sharing = alone
) -> list[QuantizedWeight]:
    """The column loop alone, at once over the output channels of several layers, [N, K] each, with one input.

    ``sharing`` does the parts that :func:`row_parts` makes of all those channels.
    """
    exact = torch.cat([weight.to(_working_dtype(weight)) for weight in weights])
    if shared is None:
        plain = column_order(torch.ones_like(exact[0]), config)
        order = ColumnOrder(plain.g_idx.long().argsort(stable=True), plain.g_idx, static=False)
        upper = torch.eye(exact.shape[1], dtype=exact.dtype, device=exact.device)
    else:
        order, upper = shared.order, shared.factor.upper.to(exact.dtype)
    parts = row_parts(len(exact), exact.device)

    def part(i: int) -> list[Tensor]:
        found = _ColumnLoop(exact[parts[i]], order, upper, config).run()
        return [found.codes, found.scales, found.zeros]

    codes, scales, zeros = (torch.cat(each, dim=1) for each in zip(*sharing(len(parts), part)))
    quantized = QuantizedWeight(codes, scales, zeros, order.g_idx, config.bits)
    edges = [0, *itertools.accumulate(len(weight) for weight in weights)]
    return [quantized.rows(slice(first, stop)) for first, stop in itertools.pairwise(edges)]


class _ColumnLoop:
    """The loop's working set, transposed so that one column of the weight is one contiguous row.

    Codes are kept minus their zero until the end, as floats: rounding a column is then divide, round, clamp.
    """

    def __init__(self, weight: Tensor, order: ColumnOrder, upper: Tensor, config: QuantizeConfig) -> None:
        self.order, self.config = order, config
        self.rest = weight.t()[order.perm].contiguous()  # [K, N], columns in processing order
        self.centred = torch.empty_like(self.rest)  # [K, N], code - zero
        pivots = upper.diagonal()
        self.cost = pivots.square().reciprocal()  # a rounding error e of column k costs (e / U_kk)^2: eq. 2
        self.spread = upper / pivots.unsqueeze(1)  # what an error of column k adds to the columns after it: eq. 3
        self.groups = order.g_idx[order.perm]
        self.groups_in_order: list[int] = self.groups.tolist()
        count = max(self.groups_in_order) + 1
        self.grids = Grid(*(self.rest.new_empty(count, self.rest.shape[1]) for _ in range(4)))  # fields [G, N]

    @timed("column loop")
    def run(self) -> QuantizedWeight:
        if self.order.static:
            for group in range(len(self.grids.scale)):
                self.fit(group, (self.groups == group).nonzero().flatten())
        for first, stop in self.panels():
            group = self.groups_in_order[first]
            if not self.order.static and (first == 0 or self.groups_in_order[first - 1] != group):
                # Its columns are consecutive and have every earlier error in them.
                length = self.groups_in_order.count(group)
                self.fit(group, torch.arange(first, first + length, device=self.rest.device))
            panel = slice(first, stop)
            errors = self.rest[panel]
            round_columns(errors, self.spread[panel, panel], self.grids, self.groups[panel], self.centred[panel])
            # Lazy batch update, eq. 4: everything after the panel at once.
            self.rest[stop:].addmm_(self.spread[panel, stop:].t(), errors, alpha=-1)
        centred = torch.empty_like(self.centred)
        centred[self.order.perm] = self.centred
        codes = centred.add_(self.grids.zero[self.order.g_idx.long()]).to(torch.uint8)
        scales, zeros = self.grids.scale.to(SCALE_DTYPE), self.grids.zero.to(torch.uint8)
        return QuantizedWeight(codes, scales, zeros, self.order.g_idx, self.config.bits)

    def panels(self) -> list[tuple[int, int]]:
        """(first, stop) of runs of columns: at most _PANEL, and of one group unless the grids are static."""
        edges, groups = [0], self.groups_in_order
        for i in range(1, len(groups)):
            new_group = groups[i] != groups[i - 1] and not self.order.static
            if new_group or i - edges[-1] == _PANEL:
                edges.append(i)
        return list(itertools.pairwise([*edges, len(groups)]))

    def fit(self, group: int, positions: Tensor) -> None:
        """Set the grid of ``group`` from the current values of the columns at ``positions``."""
        inside = self.spread[positions][:, positions]
        grid = fit_grid(self.rest[positions], self.cost[positions], self.config, inside)
        for fields, field in zip(vars(self.grids).values(), vars(grid).values()):
            fields[group] = field
