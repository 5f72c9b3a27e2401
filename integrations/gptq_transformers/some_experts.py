"""Read some experts of a mixture only: where several processes quantize a block, each needs the weights of its own."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from .experts.conversions import keep_packed_names, stored_names
from .experts.expert_list import ExpertList
from .experts.fused_layout import fused_layout


@dataclass(frozen=True)
class Part:
    """What is read of a block.

    Args:
        unread: names of the tensors in the files that are not.
        names: of modules of the block that is read, where they are called otherwise in the model's.
    """

    unread: frozenset[str] = frozenset()
    names: Mapping[str, str] = field(default_factory=dict)


def leave_out(
    model: nn.Module, name: str, frame: nn.Module, elsewhere: Collection[nn.Module], stored: Collection[str]
) -> Part:
    """Make a block, still without weights, one that is read without those of some experts' layers.

    Experts that the files hold in one tensor of a layer are all read.

    Args:
        model: with a layer for each expert.
        name: of its block.
        frame: the block as transformers makes it; its fused experts become fewer.
        elsewhere: layers of the model's block.
        stored: names of all tensors in the files.
    """
    block, frames = model.get_submodule(name), dict(frame.named_modules())
    keep_packed_names(model)  # else the names of experts would be those that transformers makes of them
    unread: set[str] = set()
    names: dict[str, str] = {}
    for path, module in block.named_modules():
        if isinstance(module, ExpertList):
            own = [i for i in range(module.num_experts) if not all(each in elsewhere for each in module.projections(i))]
            own = own or [0]  # of none, transformers could not make a tensor
            others = set(range(module.num_experts)).difference(own)
            weights = [f"{name}.{path}.{inner}.weight" for i in others for inner in _paths(module, i)]
            left = {*stored_names(model, weights).values()}
            if left and left <= {*stored} and _shrink(frames[path], len(own)):
                unread |= left
                pairs = [pair for j, i in enumerate(own) for pair in zip(_paths(module, j), _paths(module, i))]
                names |= {f"{path}.{there}": f"{path}.{here}" for there, here in pairs}
        elif module in elsewhere and path in frames:
            frames[path]._parameters["weight"] = None
    return Part(frozenset(unread), names)


def _paths(experts: ExpertList, index: int) -> list[str]:
    return [experts.layout.path(projection, index) for projection in range(len(experts.layout.paths))]


def _shrink(fused: nn.Module, experts: int) -> bool:
    """Leave so many experts to a fused module on meta, where it is a plain stack of matrices."""
    layout = fused_layout(fused)
    if layout is None or layout.biased or layout.sorted_rows or layout.passing:
        return False
    for name in layout.parameters:
        old = fused.get_parameter(name)
        fewer = torch.empty((experts, *old.shape[1:]), dtype=old.dtype, device="meta")
        fused.register_parameter(name, nn.Parameter(fewer, old.requires_grad))
    return True


@contextmanager
def tensors_but(unread: Collection[str], files: list[str]) -> Iterator[dict[str, Any] | None]:
    """What transformers reads from ``files`` (safetensors) by itself, without some; None leaves all of it to it."""
    if not unread:
        yield None
        return
    with ExitStack() as stack:
        opened = [stack.enter_context(safe_open(file, "pt")) for file in files]
        yield {key: file.get_slice(key) for file in opened for key in file.keys() if key not in unread}  # noqa: SIM118
