"""Go on where an interrupted run ended: blocks that it has finished are read from its progress, not made again."""

from __future__ import annotations

import dataclasses
import time
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from ..config import QuantizeConfig
from ..distributed.team import Team, as_tensor, from_tensor
from ..format.stored_tensors import decode
from ..model.calibration import Batch
from ..model.placement import tensors_of
from ..model.progress import Progress, fingerprint
from ..model.structure import Block
from ..training.blocks import BlockReport, trainable_vectors
from .layers import Layers
from .report import LayerReport

_LAYER = ("qweight", "qzeros", "scales", "g_idx")  # a quantized layer's tensors


class Resume:
    """Finished blocks: what ``layers`` has of them is kept in ``progress``, and taken from there.

    That is the first rank's business: the others hear of it what is in a block, and where, for those that see its disk.
    """

    def __init__(self, progress: Progress, layers: Layers, team: Team) -> None:
        self.team = team
        self.progress, self.model, self.layers = progress, layers.model, layers
        self._kept = False  # whether the first rank keeps blocks
        self.identity = ""  # digest of all that the current block's result depends on
        self._begun = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Since the run began; what an interrupted run took for its finished blocks counts."""
        return time.perf_counter() - self._begun

    def begin(self, config: QuantizeConfig, batches: list[Batch], outside: list[Tensor]) -> None:
        """All blocks depend on the settings, the calibration data, what lies outside of the blocks, and the device."""
        inputs = [item for batch in batches for item in batch.items()]
        data = [value for _, value in inputs if isinstance(value, Tensor)]
        others = [(name, None if isinstance(value, Tensor) else repr(value)) for name, value in inputs]
        constants: Any = getattr(self.model, "config", None)  # such as an epsilon, which is in no tensor
        described = constants.to_dict() if hasattr(constants, "to_dict") else None
        every = self.layers.calibrate_all_experts
        device = self.layers.placement.device  # each rank has a GPU of its own
        facts = [config.to_dict(), None if device is None else device.type, described, others, every]
        self.identity = self.progress.digest("", facts, [*data, *outside])
        self._kept = self.team.told(0, lambda: bool(self.identity))

    def begin_block(self, block: Block, elsewhere: frozenset[nn.Module] | None) -> None:
        """A block depends on its weights and on what the blocks before it do; ``elsewhere`` as of
        :meth:`Ownership.elsewhere`.
        """
        if not self._kept or not (self.team.first or elsewhere is not None):
            return
        experts = [target for target in block.targets if target.may_be_idle]
        here = [target for target in experts if target.module not in (elsewhere or ())]
        mine = {target.name: fingerprint(target.module.weight) for target in here}  # type: ignore[arg-type]
        if elsewhere is not None:
            mine = {
                name: each
                for (told,) in self.team.all_gather([as_tensor(mine)])
                for name, each in from_tensor(told).items()
            }
        facts = [block.name, [mine[target.name] for target in experts]]
        weights = {id(target.module.weight) for target in experts}
        rest = [tensor for tensor in tensors_of(block.module) if id(tensor) not in weights]
        self.identity = self.progress.digest(self.identity, facts, rest)

    def restore(self, block: Block) -> bool:
        """Whether an earlier run has finished the block; then take its results."""
        told, *stored = self.team.broadcast(0, lambda: self._load(block))
        found = from_tensor(told)
        if found is None:
            return False
        names, facts = found
        tensors = dict(zip(names, stored))
        self.layers.events.block_restored(block.name)
        for target in block.targets:
            own = {key: tensors[f"{target.name}.{key}"] for key in _LAYER if f"{target.name}.{key}" in tensors}
            if own:
                config = target.config
                self.layers.store(target, decode(own, config.bits, config.checkpoint_format))
        for name, vector in trainable_vectors(self.model, block).items():
            vector.data.copy_(tensors[name])
        self.layers.joint.readers = facts["readers"]
        self._begun = time.perf_counter() - facts["seconds"]  # as if the earlier run went on
        self.layers.report.blocks += [BlockReport(**each) for each in facts["blocks"]]
        for each in facts["layers"]:
            self.layers.add_report(LayerReport.read(each))
        return True

    def save(self, block: Block) -> None:
        """Keep a finished block, in whose place the quantized layers are, for :meth:`restore`."""
        if self.team.first and block.name not in self.progress.files:
            self.progress.save(block.name, self.identity, lambda: self._entry(block))
        path = self.progress.files.get(block.name)
        (told,) = self.team.broadcast(0, lambda: [as_tensor(None if path is None else str(path))])
        if (where := from_tensor(told)) is not None and Path(where).exists():
            self.progress.files[block.name] = Path(where)

    def _load(self, block: Block) -> list[Tensor]:
        """The block's entry, to be passed on."""
        entry = self.progress.load(block.name, self.identity)
        if entry is None:
            return [as_tensor(None)]
        tensors, facts = entry
        return [as_tensor([[*tensors], facts]), *tensors.values()]

    def _entry(self, block: Block) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors = {f"{block.name}.{key}": tensor for key, tensor in block.module.state_dict().items()}
        report = self.layers.report
        facts = {
            "layers": [dataclasses.asdict(each) for each in report.layers if each.name.startswith(f"{block.name}.")],
            "blocks": [dataclasses.asdict(each) for each in report.blocks if each.name == block.name],
            "readers": self.layers.joint.readers,
            "seconds": self.seconds,
        }
        return tensors, facts
