"""Some inputs and outputs of one stored layer: a packed weight, or one in 16 bits beside others that are packed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from gptq_backend import PackedWeight
from gptq_backend.format import selected, side_by_side


@dataclass(frozen=True)
class DensePiece:
    """A weight that is not quantized. weight: float [n, k], bias: float [n]. The methods are those of
    :class:`PackedWeight`.
    """

    weight: Tensor
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def to(self, device: torch.device) -> DensePiece:
        return self._map(lambda tensor: tensor.contiguous().to(device, copy=True))

    def outputs(self, rows: Tensor) -> DensePiece:
        return self._map(lambda tensor: selected(tensor, 0, rows))

    def padded(self, out_features: int) -> DensePiece:
        more = out_features - self.out_features
        return self._map(lambda tensor: pad(tensor, (0, 0) * (tensor.dim() - 1) + (0, more)))

    def inputs(self, first: int, count: int) -> DensePiece:
        return DensePiece(self.weight[:, first : first + count], self.bias if first == 0 else None)

    def joins(self, right: DensePiece) -> bool:
        return (self.bias is None) == (right.bias is None)

    def _map(self, change: Callable[[Tensor], Tensor]) -> DensePiece:
        return DensePiece(change(self.weight), None if self.bias is None else change(self.bias))


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
    dense = [weight for weight in run if isinstance(weight, DensePiece)]
    if not dense:
        return side_by_side([weight for weight in run if isinstance(weight, PackedWeight)])
    biases = [weight.bias for weight in dense if weight.bias is not None]
    return DensePiece(torch.cat([weight.weight for weight in dense]), torch.cat(biases) if biases else None)
