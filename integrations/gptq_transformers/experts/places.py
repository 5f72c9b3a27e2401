"""Where a checkpoint has experts and routers that the model has elsewhere or under another name."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence

from torch import nn

from gptq_backend import CheckpointError
from gptq_backend.format import ExpertLayout, expert_layout, expert_renaming
from gptq_backend.model import is_linear

from .fused_layout import fused_layout

_ROUTERS = ("gate", "router")


def expert_places(model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """The :func:`expert_renaming` for a checkpoint whose experts are in other places than the model's, or are called
    otherwise where the model has them as single layers; {} if there is nothing to rename.

    Args:
        model: a ``PreTrainedModel``, weights may be on meta.
        layers: full names of the checkpoint's layers, as far as transformers renames them by itself.

    Raises:
        CheckpointError: see :func:`expert_names.expert_renaming`.
    """
    layouts: dict[str, ExpertLayout | None] = {}
    for name, module in model.named_modules():
        if fused_layout(module) is not None:
            layouts[name] = None  # an ExpertList takes what the checkpoint has
        elif (own := _list_layout(name, module)) is not None:
            layouts[name] = own
    renaming = expert_renaming(layers, layouts)
    return renaming | _router_renaming(model, layouts, renaming, set(layers))


def _router_renaming(
    model: nn.Module, modules: Iterable[str], renaming: Mapping[str, str], layers: Collection[str]
) -> dict[str, str]:
    """Where the router beside the experts ``modules``, moved by ``renaming``, has its other name in the checkpoint."""
    stored = {wanted: own for own, wanted in renaming.items()}
    found = {}
    for parent in {module.rpartition(".")[0] for module in modules}:
        place = stored.get(f"{parent}.", f"{parent}.")
        for called, other in (_ROUTERS, _ROUTERS[::-1]):
            own = f"{place}{other}"
            if hasattr(model.get_submodule(parent), called) and own in layers and f"{place}{called}" not in layers:
                found[f"{own}."] = f"{parent}.{called}."
    return found


def _list_layout(name: str, module: nn.Module) -> ExpertLayout | None:
    """The layout of experts that the model itself has as a list of modules; None if it is not known."""
    if name.rpartition(".")[2] != "experts" or not isinstance(module, nn.ModuleList):
        return None
    layers = [f"{name}.{key}" for key, child in module.named_modules() if is_linear(child)]
    if len(layers) != 3 * len(module):
        return None
    try:
        return expert_layout(name, layers, gated=True)
    except CheckpointError:  # names of the model's own, which the checkpoint then has, too
        return None
