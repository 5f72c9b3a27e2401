"""Go on where an interrupted run ended: blocks that it has finished are read from its progress, not made again."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from torch import Tensor

from ..algorithm.refine import Step
from ..config import QuantizeConfig
from ..format import packing
from ..format.weight import QuantizedWeight
from ..model.calibration import Batch
from ..model.placement import tensors_of
from ..model.progress import Progress
from ..model.structure import Block
from ..training.blocks import BlockReport, trainable_vectors
from .layers import Layers
from .report import LayerReport

_FIELDS = ("words", "scales", "zeros", "g_idx")  # of a layer in the progress


class Resume:
    """Finished blocks: what ``layers`` has of them is kept in ``progress``, and taken from there."""

    def __init__(self, progress: Progress, layers: Layers) -> None:
        self.progress, self.model, self.layers = progress, layers.model, layers
        self.identity = ""  # digest of all that the current block's result depends on
        self._begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the run began; what an interrupted run took for its finished blocks counts."""
        return time.perf_counter() - self._begun

    def begin(self, config: QuantizeConfig, batches: list[Batch], outside: list[Tensor]) -> None:
        """All blocks depend on the settings, the calibration data, what lies outside of the blocks, and the device."""
        data = [tensor for batch in batches for tensor in batch.values()]
        constants: Any = getattr(self.model, "config", None)  # such as an epsilon, which is in no tensor
        described = constants.to_dict() if hasattr(constants, "to_dict") else None
        facts = [config.to_dict(), str(self.layers.placement.device), described, self.layers.calibrate_all_experts]
        self.identity = self.progress.digest("", facts, [*data, *outside])

    def begin_block(self, block: Block) -> None:
        """A block depends on its weights and on what the blocks before it do."""
        self.identity = self.progress.digest(self.identity, block.name, tensors_of(block.module))

    def restore(self, block: Block) -> bool:
        """Whether an earlier run has finished the block; then take its results."""
        entry = self.progress.load(block.name, self.identity)
        if entry is None:
            return False
        tensors, facts = entry
        for target in block.targets:
            if f"{target.name}.words" in tensors:
                words, scales, zeros, g_idx = (tensors[f"{target.name}.{key}"] for key in _FIELDS)
                codes = packing.unpack(words, target.config.bits, len(g_idx))
                self.layers.store(target, QuantizedWeight(codes, scales, zeros, g_idx, target.config.bits))
        for name, vector in trainable_vectors(self.model, block).items():
            vector.data.copy_(tensors[name])
        self._begun = time.perf_counter() - facts["seconds"]  # as if the earlier run went on
        self.layers.report.blocks += [BlockReport(**each) for each in facts["blocks"]]
        for each in facts["layers"]:
            self.layers.add_report(LayerReport(**each | {"steps": tuple(Step(**step) for step in each["steps"])}))
        return True

    def save(self, block: Block) -> None:
        """Keep the results of a finished block for :meth:`restore`."""
        self.progress.save(block.name, self.identity, lambda: self._entry(block))

    def _entry(self, block: Block) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors: dict[str, Tensor] = dict(trainable_vectors(self.model, block))
        for target, weight in self.layers.weights(block).items():
            fields = packing.pack(weight.codes, weight.bits), weight.scales, weight.zeros, weight.g_idx
            tensors |= {f"{target.name}.{key}": field for key, field in zip(_FIELDS, fields, strict=True)}
        report = self.layers.report
        layers = [dataclasses.asdict(each) for each in report.layers if each.name.startswith(f"{block.name}.")]
        blocks = [dataclasses.asdict(each) for each in report.blocks if each.name == block.name]
        return tensors, {"layers": layers, "blocks": blocks, "seconds": self.seconds}
