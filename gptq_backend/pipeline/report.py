"""How a run went."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..algorithm.gptq import Step
from ..config import QuantizeConfig
from ..training.blocks import BlockReport
from ..training.distill import DistillReport


@dataclass(frozen=True)
class LayerReport:
    """How one layer went. Losses and steps as in :class:`gptq.QuantizedLayer`; ``method`` is "rtn", "nearest" (of an
    embedding, which has no inputs to calibrate on) or as in :class:`Factor`; ``tokens`` counts rows, whatever their
    weights. With ``token_weights`` the losses of layers before attention are weighted, and not comparable with those of
    a run without. A training of the block comes after it.
    """

    name: str
    bits: int
    group_size: int
    loss: float
    relative_loss: float
    method: str = "rtn"
    damp_percent: float = 0.0
    tokens: int = 0
    dropped_tokens: int = 0
    seconds: float = 0.0
    steps: tuple[Step, ...] = ()

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> LayerReport:
        """Undo ``dataclasses.asdict``, also after JSON."""
        return cls(**{**facts, "steps": tuple(Step(**step) for step in facts["steps"])})


@dataclass
class QuantizeReport:
    """How a run went.

    Args:
        config: describes the result: blocks kept in 16 bits by ``keep_edge_blocks``, and layers that were never called,
            are named in ``dynamic``, which every reader of GPTQ checkpoints understands.
        seconds: wall time of the whole run; of one that was interrupted, with what it had finished but
            without the earlier steps of its distillation.
    """

    config: QuantizeConfig
    layers: list[LayerReport] = field(default_factory=list)  # one entry per layer, in the order they were done
    blocks: list[BlockReport] = field(default_factory=list)  # one entry per block that was trained
    seconds: float = 0.0
    distillation: DistillReport | None = None  # of the whole model, if there was one
    kept: dict[str, int] = field(default_factory=dict)  # weights that stay in 16 bits, see :func:`unquantized`

    @property
    def unrouted(self) -> list[str]:
        """Layers of experts that no calibration token reached, of a run that had some; rounded to nearest."""
        calibrated = any(layer.tokens for layer in self.layers)
        return [layer.name for layer in self.layers if calibrated and layer.method == "rtn"]
