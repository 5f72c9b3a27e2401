"""``QuantLinear.weight``: shape, dtype and device cost nothing, and the values are made when they are needed."""

from __future__ import annotations

import logging
import sys
import weakref
from collections.abc import Callable
from types import FrameType
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from .errors import ConfigError

logger = logging.getLogger(__name__)

_aten = torch.ops.aten
_SCALED = {
    _aten.mul_.Tensor: lambda number: number,
    _aten.mul_.Scalar: lambda number: number,
    _aten.div_.Tensor: lambda number: 1 / number,
    _aten.div_.Scalar: lambda number: 1 / number,
}
_KEPT_LAZY = (_aten.detach.default, _aten.alias.default)
_warned: weakref.WeakSet[nn.Module] = weakref.WeakSet()


class LazyWeight(Tensor):
    """What model code sees as the weight of a quantized layer, [N, K].

    Questions about shape, strides, dtype and device are answered by the tensor itself. The first operation that needs
    values makes them, and the object keeps them; the layer does not keep the object. It carries no gradient, and its
    copies and pickles are ordinary tensors. Of all that writes to a tensor only ``mul_`` and ``div_`` by a number,
    which RWKV does, change the layer; the rest is a ConfigError.

    Args:
        name: of the layer, for messages.
        make: gives the values as an ordinary contiguous tensor of the same shape, dtype and device.
        scale: multiplies the layer's weight by a number.
    """

    # transformers initialises some weights by name; those that say this are left alone.
    _is_hf_initialized = True

    _name: str
    _make: Callable[[], Tensor]
    _scale: Callable[[float], None]
    _dense: Tensor | None

    @staticmethod
    def __new__(
        cls: type[LazyWeight],
        name: str,
        shape: tuple[int, int],
        dtype: torch.dtype,
        device: torch.device,
        make: Callable[[], Tensor],
        scale: Callable[[float], None],
    ) -> LazyWeight:
        self: LazyWeight = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        self._name, self._make, self._scale, self._dense = name, make, scale, None
        return self

    def materialize(self) -> Tensor:
        """The weight as an ordinary tensor."""
        if self._dense is None:
            _warn_in_forward(self._name)
            self._dense = self._make()
        return self._dense

    # Not through __torch_function__, which would be asked for the dtype too.
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        if func in _KEPT_LAZY:
            return args[0]._again()
        if func in _SCALED and isinstance(args[0], LazyWeight) and _is_number(args[1]):
            args[0]._scale(_SCALED[func](float(args[1])))
            args[0]._dense = None
            return args[0]
        schema = func._schema.arguments
        for argument, value in [*zip(schema, args), *((a, (kwargs or {}).get(a.name)) for a in schema)]:
            written = argument.alias_info is not None and argument.alias_info.is_write
            for each in (value if isinstance(value, list | tuple) else [value]) if written else ():
                if isinstance(each, LazyWeight):
                    each._refuse()
        args, kwargs = tree_map_only(LazyWeight, LazyWeight.materialize, (args, kwargs or {}))
        return func(*args, **kwargs)

    def __setitem__(self, *_: Any) -> None:  # else the slice would be of the dense copy, and the change lost
        self._refuse()

    @property
    def data(self) -> LazyWeight:
        return self._again()

    @data.setter
    def data(self, value: Tensor) -> None:  # torch would give it to this object, and the layer would not know
        self._refuse()

    def _refuse(self) -> NoReturn:
        raise ConfigError(
            f"{self._name}.weight is quantized and cannot be written to; replace the layer by its dequantize(), "
            "which is an nn.Linear, and change that"
        )

    def _again(self) -> LazyWeight:
        shape = (self.shape[0], self.shape[1])
        other = LazyWeight(self._name, shape, self.dtype, self.device, self._make, self._scale)
        other._dense = self._dense
        return other

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        copy = self.materialize().clone()
        memo[id(self)] = copy
        return copy

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize().__reduce_ex__(protocol)

    # Reached by Python alone, without a dispatch.

    def data_ptr(self) -> int:
        return self.materialize().data_ptr()

    def untyped_storage(self) -> torch.UntypedStorage:
        return self.materialize().untyped_storage()

    def tolist(self) -> Any:
        return self.materialize().tolist()

    def numpy(self, **options: Any) -> Any:
        return self.materialize().numpy(**options)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"LazyWeight({self._name}, {tuple(self.shape)}, {self.dtype}, {self.device})"


def _is_number(value: Any) -> bool:
    return not isinstance(value, Tensor) or (value.dim() == 0 and not isinstance(value, LazyWeight))


def _warn_in_forward(name: str) -> None:
    """Once per model: its code multiplies by the weight itself, which makes a dense one in every forward pass."""
    model = None
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if frame.f_code is nn.Module._call_impl.__code__:
            model = frame.f_locals.get("self")  # the outermost wins
        frame = frame.f_back
    if model is not None and model not in _warned:
        _warned.add(model)
        logger.warning(
            "%s reads the weight of quantized layers while it runs (first: %s). The layer is dequantized each time, "
            "which is slow and takes the memory of a dense layer; keep such layers dense, with a dynamic rule "
            "'-:NAME', when you quantize the model",
            type(model).__name__,
            name,
        )
