"""GPTQ for one linear layer: fit a grid per group, round column by column, push each error onto what is left.

Notation follows Frantar et al. (arXiv 2210.17323): H the Hessian, U the upper Cholesky factor of its inverse, q the
rounded column. docs/algorithm.md maps the paper's equations to these lines.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import QuantizeConfig
from .errors import CalibrationError
from .hessian import Factor, factor
from .ordering import ColumnOrder, column_order
from .weight import QuantizedWeight

_PANEL = 128  # columns between two updates of the rest of the matrix
# Candidate scales relative to min-max: beyond 1 because a symmetric grid has one code more below zero than above.
_SHRINK = tuple(1.08 - 0.03 * i for i in range(20))


@dataclass(frozen=True)
class LayerFactor:
    """What the column loop needs of one distinct input; layers that share the input share this.

    Args:
        order: the column order.
        factor: U in that order.
        hessian: the undamped H in the original order, dead channels included.
    """

    order: ColumnOrder
    factor: Factor
    hessian: Tensor


@dataclass(frozen=True)
class QuantizedLayer:
    """Args:
    weight: the result.
    loss: ``tr(D H D^T)`` for D = quantized - original weight, per calibration token and output channel.
    relative_loss: the same over ``tr(W H W^T)``: the share of the layer's output energy that is error.
    """

    weight: QuantizedWeight
    loss: float
    relative_loss: float


def prepare_factor(hessian: Tensor, config: QuantizeConfig) -> LayerFactor:
    """Order the columns and factor H [K, K]. Channels that calibration never excited get a unit diagonal."""
    hessian = hessian.clone()
    diagonal = hessian.diagonal()
    diagonal[diagonal == 0] = 1
    order = column_order(diagonal, config)
    return LayerFactor(order, factor(hessian[order.perm][:, order.perm], config.damp_percent), hessian)


@torch.no_grad()
def quantize_weight(
    weight: Tensor,
    shared: LayerFactor | None,
    config: QuantizeConfig,
    tokens: int = 1,
    scales_dtype: torch.dtype = torch.float16,
    name: str = "layer",
) -> QuantizedLayer:
    """Quantize one weight.

    Args:
        weight: [N, K], float32 or float64; the computation runs in this dtype.
        shared: order and factor of the layer's input, or None to round to nearest without calibration.
        config: settings of this layer.
        tokens: calibration tokens behind the Hessian, to report the loss per token.
        scales_dtype: dtype the scales are stored in; they are rounded to it before anything is optimised against them.
        name: the module, for messages.

    Raises:
        CalibrationError: the weight is not finite, or too large for ``scales_dtype``.
    """
    if not weight.isfinite().all():
        raise CalibrationError(f"{name}.weight: has NaN or infinite entries; the model's file is damaged")
    columns = weight.shape[1]
    if shared is None:
        plain = column_order(torch.ones(columns, dtype=weight.dtype, device=weight.device), config)
        order = ColumnOrder(plain.g_idx.long().argsort(stable=True), plain.g_idx, static=False)
        upper = torch.eye(columns, dtype=weight.dtype, device=weight.device)
    else:
        order, upper = shared.order, shared.factor.upper.to(weight.dtype)
    loop = _ColumnLoop(weight, order, upper, config, scales_dtype)
    quantized = loop.run()
    if not quantized.scales.isfinite().all():
        raise CalibrationError(f"{name}.weight: a scale overflows {scales_dtype}; the model's weights are out of range")
    difference = quantized.dequantize(weight.dtype) - weight
    if shared is None:
        loss, energy = difference.square().sum(), weight.square().sum()
    else:
        hessian = shared.hessian.to(weight.dtype)
        loss = (difference @ hessian).mul_(difference).sum()
        energy = (weight @ hessian).mul_(weight).sum()
    return QuantizedLayer(
        quantized,
        loss=float(loss) / (max(tokens, 1) * weight.shape[0]),
        relative_loss=float(loss / energy) if float(energy) > 0 else 0.0,
    )


class _ColumnLoop:
    """The loop's working set, transposed so that one column of the weight is one contiguous row."""

    def __init__(
        self, weight: Tensor, order: ColumnOrder, upper: Tensor, config: QuantizeConfig, scales_dtype: torch.dtype
    ) -> None:
        self.order, self.upper = order, upper
        self.bits, self.sym, self.search = config.bits, config.sym, config.scale_search
        self.max_code = (1 << config.bits) - 1
        self.rest = weight.t()[order.perm].contiguous()  # [K, N], columns in processing order
        # A column's rounding error e costs (e / U_kk)^2 (eq. 2 of the paper).
        self.cost = upper.diagonal().square().reciprocal()
        self.groups_in_order = order.g_idx[order.perm].tolist()
        groups, outputs = int(order.g_idx.max()) + 1, weight.shape[0]
        self.scales = torch.empty((groups, outputs), dtype=weight.dtype, device=weight.device)
        self.zeros = torch.empty_like(self.scales)
        self.codes = torch.empty_like(self.rest, dtype=torch.uint8)
        self.scales_dtype = scales_dtype

    def run(self) -> QuantizedWeight:
        if self.order.static:
            for group in range(self.scales.shape[0]):
                members = (self.order.g_idx[self.order.perm] == group).nonzero().flatten()
                self.fit(group, members)
        for first, stop, starts_group in self.panels():
            if starts_group and not self.order.static:
                group = self.groups_in_order[first]
                length = self.groups_in_order.count(group)
                self.fit(group, torch.arange(first, first + length, device=self.rest.device))
            errors = self.panel(first, stop)
            # Lazy batch update (eq. 5): everything to the right of the panel at once.
            self.rest[stop:].addmm_(self.upper[first:stop, stop:].t(), errors, alpha=-1)
        codes = torch.empty_like(self.codes)
        codes[self.order.perm] = self.codes
        return QuantizedWeight(
            codes, self.scales.to(self.scales_dtype), self.zeros.to(torch.uint8), self.order.g_idx, self.bits
        )

    def panels(self) -> list[tuple[int, int, bool]]:
        """(first, stop, starts a group): runs of one group, cut at _PANEL; with static grids any _PANEL columns."""
        edges, groups = [0], self.groups_in_order
        starts = {0}
        for i in range(1, len(groups)):
            new_group = groups[i] != groups[i - 1] and not self.order.static
            if new_group or i - edges[-1] == _PANEL:
                edges.append(i)
                starts |= {i} if new_group else set()
        return [(a, b, a in starts) for a, b in zip(edges, [*edges[1:], len(groups)], strict=True)]

    def panel(self, first: int, stop: int) -> Tensor:
        """Round columns [first, stop) one by one -> their errors divided by U_kk, [stop - first, N]."""
        block, upper = self.rest[first:stop], self.upper[first:stop, first:stop]
        errors = torch.empty_like(block)
        pivots = upper.diagonal().tolist()
        for i in range(stop - first):
            group = self.groups_in_order[first + i]
            column, scale, zero = block[i], self.scales[group], self.zeros[group]
            code = torch.div(column, scale).round_().add_(zero).clamp_(0, self.max_code)
            self.codes[first + i] = code
            error = torch.sub(column, code.sub_(zero).mul_(scale), out=errors[i]).div_(pivots[i])
            if i + 1 < stop - first:
                block[i + 1 :].addr_(upper[i, i + 1 :], error, alpha=-1)
        return errors

    def fit(self, group: int, positions: Tensor) -> None:
        """Set the grid of ``group`` from the current values of the columns at ``positions``."""
        columns = self.rest[positions]
        scale, zero = fit_grid(
            columns, self.cost[positions], self.bits, self.sym, self.search, self.scales_dtype
        )
        self.scales[group], self.zeros[group] = scale, zero


def fit_grid(
    columns: Tensor, cost: Tensor, bits: int, sym: bool, search: bool, scales_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """A uniform grid per output channel.

    Args:
        columns: [g, N], the group's weights.
        cost: [g], price of a squared error in each column, for the search.
        bits, sym: size and kind of the grid.
        search: try scales around min-max and keep the cheapest per output channel.
        scales_dtype: the scales returned are representable in it.

    Returns:
        scale [N] > 0 and zero [N], an integer in [0, 2**bits), both in the dtype of ``columns``.
    """
    max_code = (1 << bits) - 1
    if sym:
        high = columns.abs().amax(dim=0)
        low = -high
    else:
        low, high = columns.amin(dim=0).clamp_(max=0), columns.amax(dim=0).clamp_(min=0)
    best_scale, best_zero = _grid(low, high, bits, sym, scales_dtype)
    if not search:
        return best_scale, best_zero
    weights = cost.unsqueeze(1)
    best_cost: Tensor | None = None
    for shrink in _SHRINK:
        scale, zero = _grid(low * shrink, high * shrink, bits, sym, scales_dtype)
        rounded = torch.div(columns, scale).round_().add_(zero).clamp_(0, max_code).sub_(zero).mul_(scale)
        total = rounded.sub_(columns).square_().mul_(weights).sum(dim=0)
        if best_cost is None:
            best_scale, best_zero, best_cost = scale, zero, total
        else:
            better = total < best_cost
            best_scale = torch.where(better, scale, best_scale)
            best_zero = torch.where(better, zero, best_zero)
            best_cost = torch.where(better, total, best_cost)
    return best_scale, best_zero


def _grid(low: Tensor, high: Tensor, bits: int, sym: bool, scales_dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Min-max grid over [low, high], rounded to what is stored. A group of zeros gets scale 1."""
    max_code = (1 << bits) - 1
    scale = (high - low) / max_code
    smallest = torch.finfo(scales_dtype).tiny
    scale = torch.where(scale == 0, torch.ones_like(scale), scale.clamp(min=smallest))
    scale = scale.to(scales_dtype).to(low.dtype)
    if sym:
        return scale, torch.full_like(scale, 1 << (bits - 1))
    return scale, torch.div(-low, scale).round_().clamp_(0, max_code)
