"""Layers that read one input (q, k and v; gate and up) go through the column loop as one, for fewer and larger kernels.

A forward pass comes to them one after another, and only at the last is it known that they all read the same tensor. So
those that did in one block are taken together in the next; where that proves wrong, the result is dropped and the layer
rounded by itself. Not on a CPU, which one layer keeps busy.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable

from torch import Tensor

from ..algorithm.gptq import LayerFactor, round_weights
from ..algorithm.sharing import Sharing
from ..format.weight import QuantizedWeight
from .layer_inputs import InputFactor
from .structure import Block, Target, dense_weight


class JointRounding:
    """What is rounded together in the current block, and what the next one will learn from it."""

    def __init__(self) -> None:
        self._block: dict[str, Target] = {}  # targets by their names inside the block
        self._readers: list[tuple[Callable[[], LayerFactor | None], list[str]]] = []  # of each factor of this block
        self._later: dict[str, list[str]] = {}  # in the block before: the first reader of a factor -> the others
        self._ahead: dict[Target, tuple[weakref.ref[LayerFactor], QuantizedWeight]] = {}

    @property
    def readers(self) -> list[list[str]]:
        """Names of the layers that have read one input in this block, for each of several inputs."""
        return [names for _, names in self._readers]

    @readers.setter
    def readers(self, names: list[list[str]]) -> None:
        """Of a block that an earlier run has quantized."""
        self._readers = [(lambda: None, each) for each in names]

    def begin_block(self, block: Block) -> None:
        """Take together what the block before this one has read together."""
        self._later = {names[0]: names[1:] for _, names in self._readers}
        self._readers.clear()
        self._ahead.clear()
        self._block = {target.name.removeprefix(f"{block.name}."): target for target in block.targets}

    def take(self, target: Target, weight: Tensor, source: InputFactor, sharing: Sharing) -> QuantizedWeight | None:
        """The layer's rounded weight, if it was rounded with others or now is; None if it has to be by itself.

        weight: [N, K], float32 or float64, as it is to be rounded; source: the layer's input; sharing: does the parts.
        """
        shared = source.factor
        name = next((name for name, each in self._block.items() if each is target), None)
        if name is None or (source.drift is not None and source.drift.of_output):  # which is this layer's alone
            return None
        for factor, names in self._readers:
            if factor() is shared:
                names.append(name)
                break
        else:
            self._readers.append((weakref.ref(shared), [name]))
        if target in self._ahead:
            factor, rounded = self._ahead.pop(target)
            return rounded if factor() is shared else None
        others = [self._block[other] for other in self._later.get(name, ()) if other in self._block]
        others = [each for each in others if dense_weight(each.module).shape[-1] == weight.shape[1]]
        others = [each for each in others if each.config == target.config]
        if not others or not _worth_it(weight):
            return None
        dense = (dense_weight(other.module).detach().to(weight.dtype) for other in others)
        weights = [weight, *(source.aim(each, sharing) for each in dense)]
        first, *later = round_weights(weights, shared, target.config, sharing)
        self._ahead.update({other: (weakref.ref(shared), rounded) for other, rounded in zip(others, later)})
        return first


def _worth_it(weight: Tensor) -> bool:
    return weight.device.type != "cpu"
