"""Quantize one layer of a model, hold its weight, and put the quantized layer in its place."""

from __future__ import annotations

import dataclasses
import logging
import re
import time
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithm.gptq import quantize_weight
from ..algorithm.requantize import round_changed
from ..algorithm.row_feedback import RowFactor
from ..config import QuantizeConfig
from ..distributed.team import Team, as_tensor, from_tensor
from ..format.weight import QuantizedWeight
from ..linear import QuantLinear
from ..model.file_format import tell_of_format
from ..model.joint_rounding import JointRounding
from ..model.layer_inputs import InputFactor
from ..model.placement import Placement
from ..model.structure import Block, Target, dense_weight, find_structure, is_conv1d, replace_module
from .embeddings import find_embedding
from .options import Events, RunOptions
from .report import LayerReport, QuantizeReport

logger = logging.getLogger(__name__)


class Layers:
    """The layers of one run, those that are quantized already, and the report of them."""

    def __init__(
        self, model: nn.Module, config: QuantizeConfig, options: RunOptions, events: Events, team: Team
    ) -> None:
        self.team = team
        self.model, self.backend, self.events, self.before = model, options.backend, events, options.before
        self.calibrate_all_experts = options.calibrate_all_experts
        self.structure, self.placement = find_structure(model, config, options.block_name), Placement(options.device)
        tell_of_format(self.structure.widths(config), config)
        config = dataclasses.replace(config, checkpoint_format=self.structure.checkpoint_format)
        self.embedding = find_embedding(model, config)
        if (embedding := self.embedding) is not None:
            if embedding.calibrated and embedding.head is not None:
                head = Target(embedding.head, model.get_submodule(embedding.head), embedding.config)
                self.structure = dataclasses.replace(self.structure, head=head)
            config = dataclasses.replace(config, dynamic={**embedding.rule, **(config.dynamic or {})})
        self.done: dict[nn.Module, QuantLinear] = {}  # by the dense module
        self._packed: dict[nn.Module, torch.device] = {}  # those that hold no dense weight, and where the result goes
        self.embedded: QuantizedWeight | None = None
        self.joint = JointRounding()
        self.report = QuantizeReport(self.structure.describe(config))

    @property
    def count(self) -> int:
        """Of all layers that will be in the report."""
        rounded = self.embedding is not None and not self.embedding.calibrated
        return len(self.structure.targets) + rounded

    def weights(self, block: Block) -> dict[Target, QuantizedWeight]:
        """Those of the block's layers that are quantized."""
        done = [target for target in block.targets if target.module in self.done]
        return {target: self.done[target.module].quantized_weight() for target in done}

    def quantize(self, target: Target, source: InputFactor | None, rows: RowFactor | None = None) -> None:
        """Quantize one layer for its input, or to nearest for None, and leave the dequantized weight in the module for
        the passes under way. All ranks share the work. With ``rows``, output channels make up for each other's errors.
        """
        weight, entry = self.make(target, source, self.team, rows)
        self.store(target, weight)
        self.add_report(entry)

    def make(
        self, target: Target, source: InputFactor | None, team: Team, rows: RowFactor | None = None
    ) -> tuple[QuantizedWeight, LayerReport]:
        """The layer quantized, by the ranks of ``team``; ``rows`` as of :meth:`quantize`."""
        start = time.perf_counter()
        weight = dense_weight(target.module).detach()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32))
        input_facts: dict[str, Any] = {}
        shared, tokens, rounded = None, 1, None
        if source is not None:
            factor, hessian, tokens = source.factor.factor, source.hessian, source.hessian.tokens
            input_facts = {"method": factor.method, "damp_percent": factor.damp_percent}
            input_facts |= {"tokens": tokens, "dropped_tokens": hessian.dropped}
            weight = source.aim(weight, team.work)
            shared = source.factor
            rounded = self.joint.take(target, weight, source, team.work) if rows is None else None
        quantize = partial(quantize_weight, name=target.name, sharing=team.work)
        layer = quantize(weight, shared, target.config, tokens, rounded=rounded, rows=rows)
        if (before := self.before(target.name)) is not None:
            rounded = round_changed(weight, before.to(weight.device), target.config)
            again = quantize(weight, shared, target.config, tokens, rounded=rounded)
            layer = min(again, layer, key=lambda each: each.loss)  # where both are exact, nothing changes
        entry = LayerReport(
            name=target.name,
            bits=target.config.bits,
            group_size=target.config.group_size,
            loss=layer.loss,
            relative_loss=layer.relative_loss,
            seconds=time.perf_counter() - start,
            steps=layer.steps,
            **input_facts,
        )
        return layer.weight, entry

    def share(self, made: Sequence[tuple[Target, QuantizedWeight, LayerReport]], block: Block) -> None:
        """Tell all ranks of the layers of a block that each has made by itself, and take theirs."""
        facts = [[target.name, dataclasses.asdict(entry)] for target, _, entry in made]
        weights = [field for _, each, _ in made for field in (each.codes, each.scales, each.zeros, each.g_idx)]
        found: dict[str, tuple[LayerReport, list[Tensor]]] = {}
        for told, *tensors in self.team.all_gather([as_tensor(facts), *weights]):
            for i, (name, entry) in enumerate(from_tensor(told)):
                found[name] = LayerReport.read(entry), tensors[4 * i : 4 * i + 4]
        for target in block.targets:
            if target.name in found:
                entry, fields = found[target.name]
                if target.module not in self.done:
                    codes, scales, zeros, g_idx = fields
                    self.store(target, QuantizedWeight(codes, scales, zeros, g_idx, target.config.bits))
                self.add_report(entry)

    def store(self, target: Target, quantized: QuantizedWeight) -> None:
        """Take a layer's quantized weight: packed for the result, dequantized for the passes under way.

        Of one that :meth:`packs` tells of, the dense weight is freed.
        """
        module, config = target.module, target.config
        old: Tensor = module.weight  # type: ignore[assignment]
        packed, (home, _) = self.packs(target), self.placement.home(old)
        device, dtype = self.placement.computing(old) if packed else (old.device, old.dtype)  # may be on meta
        weight = quantized.to(device)
        bias = module.bias
        if bias is not None:
            bias = bias.detach().to(self.placement.home(bias)[1])  # type: ignore[operator,arg-type]
        words = getattr(torch, config.pack_dtype)
        place = device if packed else home
        self.done[module] = QuantLinear.from_weight(
            weight, bias, config.checkpoint_format, words, target.name, self.backend, place, dtype
        )
        if packed:
            self._packed.setdefault(module, torch.device("cpu") if home.type == "meta" else home)
            self.placement.forget([old])
            module.weight = nn.Parameter(torch.empty(0, device=device, dtype=dtype), False)
        else:
            dense = weight.dequantize(torch.promote_types(dtype, torch.float32)).to(dtype)
            self.placement.replace(old, dense.t().contiguous() if is_conv1d(module) else dense)

    def packs(self, target: Target) -> bool:
        """Whether a quantized layer is dequantized anew for each call: experts, of which every rank of several ends
        with all.
        """
        return self.team.size > 1 and target.may_be_idle

    def bring_packed(self, module: nn.Module, *_: Any) -> None:
        """Before a call of a layer: give it its dense weight, if it is one that was freed."""
        if module in self._packed:
            prepared, freed = self.done[module].prepare().prepared, module.weight
            assert prepared is not None
            dense = prepared.dequantize(freed.dtype)  # type: ignore[arg-type]
            module.weight = nn.Parameter(dense.t().contiguous() if is_conv1d(module) else dense, False)

    def free_packed(self, module: nn.Module, *_: Any) -> None:
        """After the call."""
        if module in self._packed:
            weight: Tensor = module.weight  # type: ignore[assignment]
            module.weight = nn.Parameter(weight.new_empty(0), False)

    def quantize_embedding(self) -> None:
        """Round the embedding that is to be quantized without calibration; the passes see what they will see later."""
        if (target := self.embedding) is None or target.calibrated:
            return
        start, dense = time.perf_counter(), target.module.weight
        self.embedded = target.round()
        rounded = self.embedded.dequantize()
        rounded = rounded if target.head is not None else rounded.t()
        loss = float((rounded - dense.float()).square().sum())
        share = loss / max(float(dense.float().square().sum()), 1e-30)
        dense.data = rounded.to(dense.dtype).contiguous()
        config, seconds = target.config, time.perf_counter() - start
        sizes = config.bits, config.group_size
        self.add_report(LayerReport(target.name, *sizes, loss, share, method="nearest", seconds=seconds))

    def install_embedding(self) -> None:
        """Put the quantized embedding into the model."""
        if (target := self.embedding) is None:
            return
        if target.calibrated:
            assert self.structure.head is not None
            self.embedded = self.done[self.structure.head.module].quantized_weight()
        assert self.embedded is not None
        target.install(self.model, self.embedded, self.backend)

    def install(self, target: Target) -> None:
        """Put the quantized layer into the model, if there is one, and free the dense weight."""
        if target.module in self.done:
            layer = self.done[target.module]
            home = self._packed.get(target.module)
            if home is not None and home != next(layer.parameters()).device:
                layer.unprepare().to(home)  # as packed words: repacking is for whoever will call it there
            replace_module(self.model, target.name, layer)
            self.placement.forget(target.module.parameters())  # hooks hold the module

    def keep_dense(self, target: Target) -> None:
        """Leave a layer in 16 bits, and let the resulting settings say so."""
        logger.warning("%s: never called with a calibration token; kept in 16 bits", target.name)
        rules: dict[str, Mapping[str, Any]] = {f"-:{re.escape(target.name)}$": {}}  # the first match wins
        config = self.report.config
        self.report.config = dataclasses.replace(config, dynamic={**rules, **(config.dynamic or {})})

    def add_report(self, entry: LayerReport) -> None:
        """Count a layer as done."""
        if entry.method not in ("cholesky", "rtn", "nearest"):
            text = "%s: the Hessian could not be factored as it was; used %s with a damping of %g"
            logger.warning(text, entry.name, entry.method, entry.damp_percent)
        self.report.layers.append(entry)
        self.events.layer_done(entry, len(self.report.layers), self.count)

    def sort_reports(self, block: Block) -> None:
        """Those of a block's layers in module order, in whichever order they were done."""
        order = {target.name: i for i, target in enumerate(block.targets)}
        entries = self.report.layers
        places = [i for i, entry in enumerate(entries) if entry.name in order]
        for i, entry in zip(places, sorted((entries[i] for i in places), key=lambda entry: order[entry.name])):
            entries[i] = entry
