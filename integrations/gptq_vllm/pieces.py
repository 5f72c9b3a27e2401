"""Some inputs and outputs of one stored layer: a packed weight, or one in 16 bits beside others that are packed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gptq_backend import PackedWeight
from gptq_backend.format import selected, side_by_side


@dataclass(frozen=True)
class DensePiece:
    """A weight that is not quantized. weight: float [n, k]. The methods are those of :class:`PackedWeight`."""

    weight: Tensor

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def to(self, device: torch.device) -> DensePiece:
        return DensePiece(self.weight.contiguous().to(device, copy=True))

    def outputs(self, rows: Tensor) -> DensePiece:
        return DensePiece(selected(self.weight, 0, rows))

    def padded(self, out_features: int) -> DensePiece:
        return DensePiece(pad(self.weight, (0, 0, 0, out_features - self.weight.shape[0])))

    def inputs(self, first: int, count: int) -> DensePiece:
        return DensePiece(self.weight[:, first : first + count])

    def joins(self, right: DensePiece) -> bool:
        return True


AnyPiece = PackedWeight | DensePiece


def joined(weights: Sequence[AnyPiece]) -> list[AnyPiece]:
    """Neighbours that one product can serve, as one weight each."""
    runs: list[list[AnyPiece]] = []
    for weight in weights:
        if runs and type(runs[-1][0]) is type(weight) and runs[-1][0].joins(weight):  # type: ignore[arg-type]
            runs[-1].append(weight)
        else:
            runs.append([weight])
    return [_one(run) for run in runs]


def _one(run: Sequence[AnyPiece]) -> AnyPiece:
    dense = [weight.weight for weight in run if isinstance(weight, DensePiece)]
    return DensePiece(torch.cat(dense)) if dense else side_by_side([w for w in run if isinstance(w, PackedWeight)])
