"""Where the weight of a layer is kept, so that vLLM can load others into it while it serves."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Protocol

from torch import nn

from gptq_backend import ConfigError


class Described(Protocol):
    """A module that says what a graph over it depends on."""

    def describe(self) -> str: ...

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]: ...


def hold(layer: nn.Module, name: str, weight: Described, fixed: bool) -> bool:
    """Make ``weight`` the attribute ``name`` of vLLM's layer, or give new values to one of the same form that it has
    already -> whether it is another now.

    It is no child of the layer: vLLM's reload takes the tensors of all children away, and in the end puts them back.

    Args:
        fixed: graphs were made over what the layer holds.

    Raises:
        ConfigError: a graph was made, and the weight has another form now.
    """
    held = layer.__dict__.get(name)
    if held is not None and _take(held, weight):
        return False
    if held is not None and fixed:
        raise ConfigError(
            f"{getattr(layer, 'prefix', name)}: the weights to reload have another form than those before "
            f"({weight.describe()}, not {held.describe()}), over which graphs were made; start vLLM anew, or with "
            "enforce_eager=True"
        )
    layer.__dict__[name] = weight
    return True


def _take(held: Described, new: Described) -> bool:
    """Copy the values of ``new`` into the tensors of ``held``, which graphs may have recorded, if all have one form."""
    theirs = dict(new.named_parameters())
    mine = dict(held.named_parameters())
    forms = [{key: (t.shape, t.dtype, t.device) for key, t in tensors.items()} for tensors in (mine, theirs)]
    if forms[0] != forms[1] or held.describe() != new.describe():
        return False
    for key, tensor in mine.items():
        tensor.data.copy_(theirs[key])
    return True
