"""What lies outside of a model's blocks, in the device and dtype to compute in, for as long as passes use it.

Embeddings and heads take as much memory in float32 as a block: with 152,000 words of 2048 channels, 1.2 GB each. The
first are read before the first block, and the last behind the last, where most runs never come.
"""

from __future__ import annotations

from types import TracebackType
from typing import Any

from torch import nn

from ..model.placement import Placement, outside_of, tensors_of
from ..model.structure import Structure
from .embeddings import output_embeddings

_LARGE_BYTES = 64 << 20


class Outside:
    """Within this context, a module outside of the blocks finds its tensors where it computes when it is called.

    Args:
        model: with the blocks of ``structure``.
        placement: brings tensors and sends them back.

    Attributes:
        tensors: all parameters and buffers that are outside of the blocks.
    """

    def __init__(self, model: nn.Module, structure: Structure, placement: Placement) -> None:
        self._placement = placement
        self.tensors = outside_of([block.module for block in structure.blocks], model)
        mine = {id(tensor) for tensor in self.tensors}
        # Of these kinds hardly anybody reads the weight but their own call.
        found: list[Any] = [
            module for module in model.modules() if isinstance(module, nn.Embedding) or type(module) is nn.Linear
        ]
        large = [each for each in found if each.weight.nbytes >= _LARGE_BYTES and id(each.weight) in mine]
        head = output_embeddings(model)
        kept = {each.weight for each in large if each is not head}
        self._late = {each.weight for each in large if each is head} - kept
        self._large, self._hooks = large, list[Any]()

    def __enter__(self) -> Outside:
        self._hooks = [module.register_forward_pre_hook(self._called) for module in self._large]
        self._placement.bring([tensor for tensor in self.tensors if tensor not in self._late])
        return self

    def rest(self) -> None:
        """Send back what is large, until it is called again."""
        self._placement.send_back([module.weight for module in self._large])

    def __exit__(self, kind: type[BaseException] | None, *_: BaseException | TracebackType | None) -> None:
        for hook in self._hooks:
            hook.remove()
        if kind is None:
            self._placement.send_back(self.tensors)

    def _called(self, module: nn.Module, *_: Any) -> None:
        self._placement.bring([tensor for tensor in tensors_of(module) if not self._placement.brought(tensor)])
