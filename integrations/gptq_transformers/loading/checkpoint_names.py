"""From a checkpoint's tensor names to a model's, the way the running transformers will rename them while loading."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from gptq_backend import CheckpointError
from gptq_backend.format import ExpertLayout, expert_layout, expert_renaming, layer_names, renamed
from gptq_backend.model import is_linear

from ..experts.conversions import model_conversions
from ..experts.fused_layout import fused_layout

_ROUTERS = ("gate", "router")
_HEADS = ("lm_head", "embed_out")  # GPT-NeoX has either, by version


@dataclass(frozen=True)
class CheckpointNames:
    """What a model calls the tensors of a checkpoint.

    Args:
        of: ``{name in the checkpoint: name in the model}``.
        renaming: that of experts, which is a part of it (see ``expert_renaming``). transformers does not know it, and
            has to be told (see ``prepare.follow_renaming``).
    """

    of: dict[str, str]
    renaming: dict[str, str]


def checkpoint_names(
    model: nn.Module, keys: Iterable[str], key_mapping: Mapping[str, str] | None = None
) -> CheckpointNames:
    """Names in the model, see :func:`model_names`, also of experts that the checkpoint calls otherwise.

    Raises:
        CheckpointError: experts whose names are not known.
    """
    names = model_names(model, keys, key_mapping)
    layers = layer_names(names.values())
    renaming = expert_places(model, layers) | _head_renaming(model, layers)
    if renaming:
        names = {key: renamed(name, renaming) for key, name in names.items()}
    return CheckpointNames(names, renaming)


def _head_renaming(model: Any, layers: Collection[str]) -> dict[str, str]:
    """Where the checkpoint gives the output embedding the name that another version of transformers has for it."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    own = next((name for name, module in model.named_modules() if module is head), "")
    prefix = getattr(model, "base_model_prefix", "")  # which a name that the model does not have was given, maybe
    others = [place for name in _HEADS if not hasattr(model, name) for place in (name, f"{prefix}.{name}")]
    if own not in _HEADS or own in layers or not set(others) & set(layers):
        return {}
    return {f"{name}.": f"{own}." for name in others}


def model_names(model: nn.Module, keys: Iterable[str], key_mapping: Mapping[str, str] | None = None) -> dict[str, str]:
    """``{name in the checkpoint: name in the model}``; ``key_mapping`` is the argument of ``from_pretrained``."""
    rename = _renaming(model, key_mapping)
    prefix = getattr(model, "base_model_prefix", "")
    modules = {name for name, _ in model.named_modules()}
    return {key: _placed(rename(key), prefix, modules) for key in keys}


def _renaming(model: nn.Module, key_mapping: Mapping[str, str] | None) -> Callable[[str], str]:
    try:
        from transformers.core_model_loading import WeightRenaming, rename_source_key
    except ImportError:  # transformers 4
        return _renaming_of_4(model, key_mapping)
    renamings = [each for each in model_conversions(model, key_mapping=key_mapping) if isinstance(each, WeightRenaming)]
    return lambda key: rename_source_key(key, renamings, [])[0]


def _renaming_of_4(model: Any, key_mapping: Mapping[str, str] | None) -> Callable[[str], str]:
    def rename(key: str) -> str:
        key, _ = model._fix_state_dict_key_on_load(key)
        for pattern, replacement in (key_mapping or {}).items():
            key, count = re.subn(pattern, replacement, key)
            if count:
                break
        return key

    return rename


def _placed(key: str, prefix: str, modules: set[str]) -> str:
    """``key`` with the base model's prefix added or removed, whichever leads deepest into the model.

    Depth instead of presence, because an expert's layer does not exist yet in a model that fuses its experts.
    """
    candidates = [key]
    if prefix and key.startswith(f"{prefix}."):
        candidates.append(key.removeprefix(f"{prefix}."))
    elif prefix:
        candidates.append(f"{prefix}.{key}")
    return max(candidates, key=lambda name: _depth(name, modules) - (name.count(".") - key.count(".")) / 100)


def _depth(key: str, modules: set[str]) -> float:
    """Share of the leading components of ``key`` that name a module."""
    parts = key.split(".")
    known = 0
    while known < len(parts) and ".".join(parts[: known + 1]) in modules:
        known += 1
    return known / len(parts)


def expert_places(model: nn.Module, layers: Sequence[str]) -> dict[str, str]:
    """The :func:`expert_renaming` for a checkpoint whose experts are in other places than the model's, or are called
    otherwise where the model has them as single layers; {} if there is nothing to rename.

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
