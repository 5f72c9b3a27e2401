"""Knows whether the tensors whose addresses calls hold are still those of the modules."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from gptq_backend.kernels import places

Entry = tuple[dict[str, Any], str, Any]  # a dictionary, a key in it, and what lies there


class Held:
    """Keeps tensors alive, so that an address is never one of freed memory, whatever is done to a parameter.

    Args:
        entries: where the modules have their tensors.
        more: further tensors to keep.
    """

    def __init__(self, entries: Sequence[Entry], more: Sequence[Tensor] = ()) -> None:
        self._dicts, self._keys, self._values = zip(*entries)
        self._tensors = [value for value in self._values if isinstance(value, Tensor)]
        self._kept: list[Any] = [tensor.detach() for tensor in (*self._tensors, *more)]
        self._addresses = list(map(Tensor.data_ptr, self._tensors))

    @classmethod
    def joined(cls, parts: list[Held], entries: Sequence[Entry]) -> Held:
        """Those of all parts, and further entries, which hold no tensors."""
        whole = cls(entries)
        whole._kept += parts
        for part in parts:
            whole._dicts += part._dicts
            whole._keys += part._keys
            whole._values += part._values
            whole._tensors += part._tensors
            whole._addresses += part._addresses
        return whole

    @property
    def places(self) -> tuple[tuple[Any, ...], ...]:
        """For :func:`places.untouched`."""
        return self._dicts, self._keys, self._values, (), ()

    def outdated(self) -> bool:
        return not places.unchanged(self._dicts, self._keys, self._values) or self.moved()

    def moved(self) -> bool:
        """Whether the same tensors have other memory."""
        return list(map(Tensor.data_ptr, self._tensors)) != self._addresses


def entries_of_packed(layer: Any) -> list[Entry]:
    """Of a quantized linear layer or embedding."""
    tensors = layer._parameters
    return [
        (layer.__dict__, "changes", layer.changes),
        (layer.__dict__, "_parameters", tensors),
        *((tensors, name, tensors.get(name)) for name in ("qweight", "scales", "zeros", "bias")),
    ]


def entries_of_dense(module: Any) -> list[Entry]:
    """Of a norm, or a linear layer that is not quantized."""
    return [(module._parameters, name, module._parameters.get(name)) for name in ("weight", "bias")]
