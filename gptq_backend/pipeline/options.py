"""What a caller may choose about a run, and what it is told while it runs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..format.weight import QuantizedWeight
from ..model.structure import BlockNames
from .report import LayerReport


def _never_quantized(name: str) -> QuantizedWeight | None:
    return None


@dataclass(frozen=True)
class RunOptions:
    """How to run; the settings of the result are in :class:`QuantizeConfig`.

    Args:
        batch_size: sequences per forward pass; None aims at about 2048 tokens.
        block_name: full names of the lists of blocks to quantize; None chooses, see :func:`structure.find_blocks`.
        backend: kernel of the resulting layers; None chooses the fastest that fits.
        device: where to compute, e.g. ``cuda``: blocks are moved there for their turn and back; a distillation moves
            both models there as a whole. None computes where the weights are.
        before: what a layer was, by its name, if its weight is one that was quantized before and then changed: the
            result begins there if that is better than to begin anew.
        calibrate_all_experts: calibrate every expert on all tokens, not only on those that its router sends to it.
    """

    batch_size: int | None = None
    block_name: BlockNames = None
    backend: str | None = None
    device: torch.device | str | None = None
    before: Callable[[str], QuantizedWeight | None] = _never_quantized
    calibrate_all_experts: bool = False


class Events:
    """What happens during a run. Override the methods that you want to be told by; these do nothing."""

    def calibration_chosen(self, choice: Any) -> None:
        """``calibration="auto"``, which adapters offer, has chosen its samples."""

    def sensitivity_step(self, done: int, total: int) -> None:
        """So many of the steps are done in which a budget's chooser measures what each layer's rounding costs."""

    def budget_planned(self, plan: Any) -> None:
        """A budget is spent: bits and group sizes are chosen."""

    def block_needed(self, name: str, block: nn.Module) -> None:
        """A block is about to be used for the first time; its weights must be in place when this returns."""

    def weights_elsewhere(self, name: str, layers: frozenset[nn.Module]) -> None:
        """Of the block that will be needed next, the weights of these layers need not be in place: other ranks have
        them.
        """

    def structure_found(self, blocks: int, layers: int) -> None:
        """A run begins, over so many blocks, and so many layers in all."""

    def block_restored(self, name: str) -> None:
        """An earlier run has finished the block. Its layers are told of next, as done, although nothing was done."""

    def layer_done(self, layer: LayerReport, done: int, total: int) -> None:
        """A layer is quantized: ``done`` of ``total``."""

    def block_done(self, name: str, block: nn.Module) -> None:
        """All layers of a block are quantized, and nothing reads the block any more."""

    def training_step(self, done: int, total: int, loss: float) -> None:
        """A step of the distillation is done; ``loss`` is the divergence on its batch, in nats per token."""
