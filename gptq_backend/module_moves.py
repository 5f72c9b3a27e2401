"""What others do to modules: functions that move or cast their tensors, accelerate's offloading, FSDP's shards."""

from __future__ import annotations

import random
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .errors import ConfigError

# Held while tensors change their layout, as several threads may call a layer for the first time at once. One for all
# layers, since a lock of each could not be copied with it; the forward pass of a prepared layer does not take it: it
# reads one attribute, which is replaced as a whole.
_LOCK = threading.RLock()


@contextmanager
def changing_layout() -> Iterator[None]:
    """One thread at a time, and no inference tensors, which could never be trained with."""
    with _LOCK, torch.inference_mode(False):
        yield


def effect(fn: Callable[[Tensor], Tensor], home: torch.device) -> tuple[torch.device, bool, bool]:
    """What ``fn``, as ``nn.Module._apply`` gets it, does with a tensor on ``home``.

    Returns:
        device: where its result is.
        keeps_values: False for ``to_empty()``, and on the meta device.
        shares: it puts the tensor into shared memory, in place.
    """
    # Values that no memory has held before, lest an uninitialised result happen to equal them.
    probe = torch.tensor([random.getrandbits(62), random.getrandbits(62)], device=home)
    before = probe.tolist()
    result = fn(probe)
    cast = result.dtype != probe.dtype
    keeps = not result.is_meta and (cast or result.tolist() == before)
    return result.device, keeps, probe.is_cpu and probe.is_shared()


def is_sharded(tensor: Tensor) -> bool:
    """Whether it is a DTensor, of which this process holds a part, as FSDP makes them."""
    return hasattr(tensor, "device_mesh")


def check_whole(tensor: Tensor) -> None:
    """Raise a ConfigError if it is sharded: a kernel would read memory of other processes."""
    if is_sharded(tensor):
        raise ConfigError(
            "a quantized layer is sharded over processes (FSDP), and its stored tensors need all shards; save the "
            "adapter alone, and take the base model from the folder that it was loaded from"
        )


def check_shardable(name: str, tensor: Tensor) -> None:
    """Raise a ConfigError if a tensor that a layer is given before it is prepared is sharded: what a kernel makes of
    it in a call would be taken away again after it.
    """
    if is_sharded(tensor):
        raise ConfigError(
            f"{name}: a quantized layer was sharded over processes (FSDP) before its weights were loaded and prepared; "
            "load them and call prepare() first (accelerate: fsdp_cpu_ram_efficient_loading: false)"
        )


def has_shards(parameters: Mapping[str, Any], state_dict: Mapping[str, Any], prefix: str) -> bool:
    """Whether a layer is sharded, and ``state_dict`` has shards like its own behind ``prefix``, or nothing of it.

    Such are the state dicts of a sharded model, and those of an adapter. A checkpoint has tensors of other shapes.
    """
    mine, theirs = parameters["qweight"], state_dict.get(f"{prefix}qweight")
    return is_sharded(mine) and (theirs is None or theirs.shape == mine.shape)


def offloading_hook(module: nn.Module) -> Any:
    """accelerate's hook that brings the module's weights for each call and takes them away again, or None."""
    hook = getattr(module, "_hf_hook", None)
    return next((item for item in getattr(hook, "hooks", [hook]) if getattr(item, "offload", False)), None)
