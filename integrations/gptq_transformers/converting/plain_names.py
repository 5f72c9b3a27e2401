"""Under which names does plain transformers look for the weights of a quantized checkpoint, once they are dense?

Tools cut layers apart (Phi-3's ``gate_up_proj``) and call experts as they like. Our loader reads such layers where they
are; plain transformers would leave its own at random.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from gptq_backend import ConfigError
from gptq_backend.format import (
    ExpertLayout,
    Manifest,
    checkpoint_files,
    expert_renaming,
    layer_names,
    read_manifest,
    renamed,
)

from ..experts.conversions import converters, produces
from ..experts.fused_layout import fused_layout
from ..loading.checkpoint_names import checkpoint_names, model_names
from ..loading.checks import absent, check_dense_shapes, check_loaded
from ..loading.skeleton import UnknownModel, build_skeleton
from ..loading.split_layers import split_layers


@dataclass(frozen=True)
class PlainNames:
    """Where layers of a checkpoint go.

    Args:
        of: new names of layers that are called otherwise; others keep theirs.
        joined: layers whose rows become one layer, in order, by its new name.
    """

    of: Mapping[str, str] = field(default_factory=dict)
    joined: Mapping[str, list[str]] = field(default_factory=dict)


def plain_names(folder: Path, manifest: Manifest) -> PlainNames:
    """For the checkpoint in ``folder`` with these tensors; nothing changes where transformers has no such model.

    Raises:
        CheckpointError: config.json cannot be used, or experts have names that are not known.
    """
    try:
        model: Any = build_skeleton(folder, manifest)
    except UnknownModel:
        return PlainNames()
    keys = [f"{layer}.weight" for layer in layer_names(manifest)]
    plain = model_names(model, keys)
    layers = layer_names(plain.values())
    renaming = checkpoint_names(model, keys).renaming | expert_renaming(layers, _converted(model))
    stored = {
        renamed(name, renaming).removesuffix(".weight"): key.removesuffix(".weight") for key, name in plain.items()
    }
    joined = {}
    for name in split_layers(model, layer_names(f"{layer}.weight" for layer in stored)):
        parts = [stored[f"{name.rpartition('.')[0]}.{part}"] for part in model.get_submodule(name).parts]
        place = parts[0].rpartition(".")[0]
        joined[f"{place}.{name.rpartition('.')[2]}"] = parts
    moved = {own: name for name, own in stored.items() if f"{name}.weight" != plain[f"{own}.weight"]}
    return PlainNames(moved, joined)


def _converted(model: nn.Module) -> dict[str, ExpertLayout]:
    """Of modules that hold all experts in one: from which layers transformers 5 makes them while loading."""
    made_of, found = converters(model), {}
    for name, module in model.named_modules():
        layout = fused_layout(module) if made_of else None
        if layout is None:
            continue
        sources = [
            [pattern.rpartition("experts.")[2].removesuffix(".weight") for pattern in each.source_patterns]
            for parameter in (layout.first, "down_proj")
            for each in [next((each for each in made_of if produces(each, f"{name}.{parameter}")), None)]
            if each is not None
        ]
        paths = [path.replace("*", "{}") for patterns in sources for path in patterns]
        if len(paths) == 2 + layout.gated and all("{}." in path for path in paths):
            found[name] = ExpertLayout(tuple(paths))
    return found


def check_plain(folder: Path) -> None:
    """Whether plain transformers finds all that it needs in the dense checkpoint in ``folder``.

    Raises:
        ConfigError: it would not, with the first tensor.
    """
    manifest = read_manifest(checkpoint_files(folder))
    try:
        model = build_skeleton(folder, manifest)
    except UnknownModel:
        return
    names = model_names(model, manifest)
    held = {names[key]: info for key, info in manifest.items()}
    made_of = converters(model)
    made = {
        place
        for name in held
        for place, source in (converter.rename_source_key(name) for converter in made_of)
        if source is not None
    }
    with torch.device("meta"):
        check_dense_shapes(model, held, dict(model.named_parameters()))
    lost = absent(model, held, ())
    lost += [
        key
        for key, _ in model.named_parameters()
        if key not in held and key not in made and any(produces(each, key) for each in made_of)
    ]
    try:
        check_loaded(model, lost)
    except Exception:
        raise ConfigError(
            "the layers of this checkpoint are called otherwise than transformers calls dense ones "
            f"({lost[0]} would be missing), and cannot be written as such; load it with "
            "gptq_transformers.from_quantized, and call dequantize() on the model"
        ) from None
