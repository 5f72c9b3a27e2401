"""Where a calibration run computes, and where its tensors are when it is not their turn."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable

import torch
from torch import Tensor, nn

# What is freed in the meantime may stay with the process.
_TRIM_BYTES = 1 << 30
# Waiting inputs that take more than this on a GPU make room for their layer's factor, in host memory.
_PARK_BYTES = 4 << 30


class Placement:
    """Brings parameters and buffers to the device and dtype to compute in, and back.

    On a CPU, 16-bit parameters are computed in float32: more accurate, and faster where it lacks 16-bit units.

    Args:
        device: where to compute; None means where each tensor is.
    """

    def __init__(self, device: torch.device | str | None = None) -> None:
        self.device = None if device is None else torch.device(device)
        self._homes: dict[Tensor, tuple[torch.device, torch.dtype]] = {}
        self._freed = 0  # bytes of host memory since they were given back to the system

    def bring(self, tensors: Iterable[Tensor]) -> None:
        for tensor in tensors:
            if tensor.is_meta:  # the hook that offloaded it brings it
                continue
            self._homes[tensor] = self.home(tensor)
            self.replace(tensor, tensor.data.to(*self.computing(tensor)))

    def computing(self, tensor: Tensor) -> tuple[torch.device, torch.dtype]:
        """Device and dtype that the tensor is or would be brought to."""
        device, dtype = self.device or torch.device("cpu" if tensor.is_meta else tensor.device), tensor.dtype
        if isinstance(tensor, nn.Parameter) and tensor.is_floating_point() and device.type == "cpu":
            dtype = torch.promote_types(dtype, torch.float32)
        return device, dtype

    def send_back(self, tensors: Iterable[Tensor]) -> None:
        """Those that were not brought stay."""
        for tensor in tensors:
            if tensor in self._homes:
                self.replace(tensor, tensor.data.to(*self._homes.pop(tensor)))

    def brought(self, tensor: Tensor) -> bool:
        """Whether the tensor is here, not sent back yet."""
        return tensor in self._homes

    def home(self, tensor: Tensor) -> tuple[torch.device, torch.dtype]:
        """Device and dtype that the tensor has outside of the run."""
        return self._homes.get(tensor, (tensor.device, tensor.dtype))

    def forget(self, tensors: Iterable[Tensor]) -> None:
        """They are not needed any more: their memory is freed, whoever holds them."""
        for tensor in tensors:
            self._homes.pop(tensor, None)
            self.replace(tensor, tensor.data.new_empty(0))

    def replace(self, tensor: Tensor, data: Tensor) -> None:
        """Give ``tensor`` other values, and the memory of the old ones back to the system, a gigabyte at a time.

        The allocator would keep it, in pieces between tensors that live on: a block's worth and more.
        """
        if tensor.device.type == "cpu" and data.data_ptr() != tensor.data_ptr():
            self._freed += tensor.nbytes
        tensor.data = data
        if self._freed >= _TRIM_BYTES:
            self._freed = 0
            _give_back_freed_memory()

    def park(self, inputs: list[Tensor]) -> None:
        """Move large inputs to host memory until :meth:`fetch`; the tensor objects stay the same."""
        if self.device is None or sum(x.nbytes for x in inputs) <= _PARK_BYTES:
            return
        for x in inputs:
            host = torch.empty_like(x, device="cpu", pin_memory=x.is_cuda)
            x.data = host.copy_(x, non_blocking=True)

    def aside(self, tensor: Tensor) -> Tensor:
        """What is needed only later: where the run computes on a GPU a copy in host memory, else the tensor itself."""
        return tensor if self.device is None or self.device.type == "cpu" else tensor.cpu()

    def fetch(self, x: Tensor) -> None:
        """Undo :meth:`park`."""
        if self.device is not None:
            x.data = x.data.to(self.device, non_blocking=True)


def _give_back_freed_memory() -> None:
    """Of glibc; others have no such call, or need none."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)) is not None:
        trim(0)


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers of a module."""
    return [*module.parameters(), *module.buffers()]


def outside_of(blocks: Iterable[nn.Module], model: nn.Module) -> list[Tensor]:
    """Those of a model that are in none of its blocks."""
    inside = {id(tensor) for block in blocks for tensor in tensors_of(block)}
    return [tensor for tensor in tensors_of(model) if id(tensor) not in inside]
