"""What rounding does to some output channels of each layer, for each way to store it: one pass through the model.

The model is not changed: all layers see what the 16-bit model makes of the calibration text. GPTQ treats the output
channels of a layer alike and one by one, so a sample of them tells of all.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithm.gptq import round_weights
from ..config import QuantizeConfig
from ..distributed.team import Team
from ..model.calibration import Batch, check_fits
from ..model.layer_inputs import Factors, LayerInput
from ..model.placement import outside_of, tensors_of
from ..model.structure import Block, Target, dense_weight, evaluating
from ..pipeline.layers import Layers
from ..pipeline.options import Events, RunOptions
from ..pipeline.passes import BlockState, Passes, Phase, Place
from .storage import Storage, fitting

_CHANNELS = 64  # of each layer that are rounded
_EXPERTS = 16  # of each block that are looked at


@dataclass(eq=False)
class Probe:
    """Rounding errors of a sample of a layer's output channels.

    Args:
        target: the layer.
        channels: int64 [C], of its outputs.
        errors: float32 [C, K] by way to store it, rounded minus original weight.
    """

    target: Target
    channels: Tensor
    errors: dict[Storage, Tensor] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Group:
    """Layers that must be stored alike, since a reader may join them: those of one block that read the same input, and
    all experts of a block.
    """

    block: str  # full name
    names: tuple[str, ...]  # of all of its layers, in full
    choices: tuple[Storage, ...]  # ways to store it that all of its layers can have
    probes: tuple[Probe, ...]  # of its layers; of experts, of some of them


def probe_rounding(
    model: nn.Module,
    config: QuantizeConfig,
    batches: list[Batch],
    storages: Sequence[Storage],
    options: RunOptions,
    on_block: Callable[[], None],
) -> list[Group]:
    """Round a sample of each layer's output channels in each of ``storages`` that the layer can have.

    Args:
        config: of the run; layers that its rules skip, or give settings of their own, are left out.
        batches: of calibration data.
        on_block: called after each block.

    Raises:
        ConfigError, CalibrationError: as of ``quantize_model``.
    """
    as_preset: dict[str, Any] = {item.name: None for item in dataclasses.fields(config.preset)}
    cheap = dataclasses.replace(config, quality="fast", true_sequential=True, **as_preset)
    run = _Probing(Layers(model, cheap, options, Events(), Team()), cheap, storages, on_block)
    with torch.no_grad(), evaluating(model):
        run.calibrate(batches)
    return run.groups


class _Probing:
    """Gives each block its turn, and rounds where the passes wait."""

    def __init__(
        self, layers: Layers, config: QuantizeConfig, storages: Sequence[Storage], on_block: Callable[[], None]
    ) -> None:
        self.layers, self.config, self.storages, self.on_block = layers, config, storages, on_block
        self.structure, self.placement = layers.structure, layers.placement
        self.factors, self.passes = Factors(self.placement, layers.team), Passes(layers, config, layers.team)
        self.given = Storage(config.group_size, config.bits)  # for layers that fit nothing else
        self.groups: list[Group] = []
        self._wanted: set[Target] = set()  # of the current block: layers to round
        self._inputs: dict[Target, object] = {}  # likewise: a mark of what each layer has read
        self._probes: dict[Target, Probe] = {}

    def calibrate(self, batches: list[Batch]) -> None:
        check_fits(self.layers.model, batches)
        outside = outside_of([block.module for block in self.structure.blocks], self.layers.model)
        self.placement.bring(outside)
        self.passes.run(batches, self.serve_place, self.serve_layer, lambda *_: None)  # one rank has no rounds
        self.finish_block()
        self.placement.send_back(outside)

    def serve_place(self, block: Block, place: Place) -> None:
        """All passes wait at a place of ``block``."""
        state = self.passes.state
        if place is Place.START and (state is None or block is not state.block):
            self.finish_block()
            self.placement.bring(tensors_of(block.module))
            self.passes.state = BlockState(block, Phase.QUANTIZING)
            own = [target for target in block.targets if self.config.for_module(target.name) is self.config]
            self._wanted = {target for target in own if not target.may_be_idle} | _some_experts(own)

    def serve_layer(self, target: Target, inputs: list[LayerInput]) -> None:
        """All passes wait in front of a layer, with ``inputs`` for it."""
        if target not in self._wanted or target in self._probes:
            return
        weight = dense_weight(target.module).detach()
        generator = torch.Generator().manual_seed(0)
        channels = torch.randperm(len(weight), generator=generator)[:_CHANNELS].sort().values
        probe = Probe(target, channels)
        rows = weight[channels.to(weight.device)].float()
        for storage in fitting(self.storages, target) or [self.given]:
            config = dataclasses.replace(target.config, **storage.settings)
            source = self.factors.of(dataclasses.replace(target, config=config), inputs)
            if source is None:  # no token
                return
            rounded = round_weights([rows], source.factor, config)[0]
            probe.errors[storage] = rounded.dequantize(torch.float32) - rows
            self._inputs[target] = source.hessian
        self._probes[target] = probe

    def finish_block(self) -> None:
        """End a block's turn: see which of its layers belong together."""
        state, self.passes.state = self.passes.state, None
        if state is None:
            return
        alike: dict[object, list[Target]] = {}
        for target in state.block.targets:
            if self.config.for_module(target.name) is not self.config:
                continue
            if target.may_be_idle:
                alike.setdefault("experts", []).append(target)
            elif target in self._probes:
                alike.setdefault(self._inputs[target], []).append(target)
        for targets in alike.values():
            choices = [set(fitting(self.storages, target)) for target in targets]
            common = tuple(each for each in self.storages if all(each in some for some in choices))
            probes = tuple(self._probes[target] for target in targets if target in self._probes)
            if probes:
                names = tuple(target.name for target in targets)
                self.groups.append(Group(state.block.name, names, common or (self.given,), probes))
        self._probes, self._inputs = {}, {}
        self.factors.clear()
        self.placement.send_back(tensors_of(state.block.module))
        self.on_block()


def _some_experts(targets: Sequence[Target]) -> set[Target]:
    """All layers of some experts, evenly spaced."""
    experts: dict[str, list[Target]] = {}
    for target in targets:
        if target.may_be_idle:
            experts.setdefault(target.name.rpartition(".")[0], []).append(target)
    step = -(-len(experts) // _EXPERTS)
    return set(itertools.chain.from_iterable(list(experts.values())[:: max(step, 1)]))
