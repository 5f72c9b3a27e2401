"""Multiplies the head in the call of the layers, whose result passes a norm and then the head in most models."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend import QuantLinear, TiedHead
from gptq_backend.kernels import cpu_block, cpu_dense, cpu_layers

from .held import Held, entries_of_dense, entries_of_packed
from .match import NoMatch, dense_of, linear_of, norm_of
from .watch import Watch


class Ending:
    """The norm behind the last layer, and the head."""

    def __init__(self, norm: Any, head: Any) -> None:
        self.norm, self.head = norm, head
        self._watch: Watch | None = None
        self._held: Held | None = None
        self._call: cpu_layers.Ending | None = None
        self._product: cpu_dense.Product | None = None

    def call_for(self, x: Tensor) -> cpu_layers.Ending | None:
        """What computes both for the last layer's result x [B, T, H], of one position each."""
        self._renew()
        if x.shape[1] != 1 or self.norm.weight.dtype is not x.dtype:  # a wider weight makes a wider result
            return None
        return self._call if self._product is None or self._served(x) else None

    def product_for(self, x: Tensor) -> cpu_dense.Product | None:
        """What multiplies a dense head with x [..., H], if that is faster than torch."""
        self._renew()
        return self._product if self._product is not None and self._served(x) else None

    def _served(self, x: Tensor) -> bool:
        """Whether a dense head can be multiplied with it, and the rows are few."""
        width = self.head.in_features
        return (
            type(x) is Tensor
            and x.is_cpu
            and x.dtype is self.head.weight.dtype
            and x.dim() > 0
            and x.shape[-1] == width
            and 0 < x.numel() <= cpu_dense.FEW_ROWS * width
            and not torch.is_autocast_enabled("cpu")
        )

    def _renew(self) -> None:
        """Make calls that read the present tensors; none if somebody touched the modules."""
        if self._watch is None:
            self._watch = Watch([self.norm, self.head], [], [], [self.norm, self.head], [self.norm])
        if not self._watch.untouched():
            self._held = self._call = self._product = None
        elif self._held is None or self._held.outdated():
            self._call = self._product = None
            try:
                self._held = Held([*entries_of_dense(self.norm), *_entries_of(self.head)])
                norm, head = norm_of(self.norm), _weight_of(self.head)
                if norm is not None:
                    self._call = cpu_layers.Ending(norm, head)
                if isinstance(head, cpu_dense.Dense):
                    self._product = cpu_dense.Product(head)
            except Exception:  # the modules' own code serves, or says better what is wrong
                self._call = self._product = None

    def __getstate__(self) -> dict[str, Any]:
        """For copies and pickles, which look anew at what they hold."""
        return {"norm": self.norm, "head": self.head, "_watch": None, "_held": None, "_call": None, "_product": None}


def find_ending(model: Any, layer: nn.Module) -> Ending | None:
    """The norm and the head behind ``layer``, the last one; None for a model without a head.

    Raises:
        NoMatch: their parts are not known.
    """
    head = model.get_output_embeddings()
    if head is None:
        return None
    norms = [norm for norm in _beside(model, layer) if _is_norm(norm)]
    if len(norms) != 1:
        raise NoMatch(f"{len(norms)} norms lie beside the layers")
    if any("forward" in vars(module) for module in (head, *norms)):
        raise NoMatch("something else runs it already")
    _weight_of(head)
    return Ending(norms[0], head)


def _beside(model: nn.Module, layer: nn.Module) -> list[nn.Module]:
    """The modules that stand beside the list of layers."""
    for parent in model.modules():
        for child in parent.children():
            if any(each is layer for each in child.children()):
                return list(parent.children())
    return []


def _is_norm(module: nn.Module) -> bool:
    try:
        return norm_of(module) is not None
    except NoMatch:
        return False


def _weight_of(head: Any) -> cpu_block.Linear | cpu_dense.Dense:
    if type(head) is nn.Linear:
        if type(head.weight.detach()) is not Tensor or not head.weight.is_cpu or not head.weight.is_contiguous():
            raise NoMatch("its weight is no tensor that lies in rows on the CPU")
        return dense_of(head)
    if type(head) is QuantLinear:
        return linear_of(head)
    if type(head) is TiedHead and head.bias is None and head.embedding.by_token:
        return linear_of(head.embedding)
    raise NoMatch(f"{type(head).__name__} is no head that it knows")


def _entries_of(head: Any) -> list[Any]:
    if type(head) is nn.Linear:
        return entries_of_dense(head)
    return entries_of_packed(head.embedding if type(head) is TiedHead else head)
