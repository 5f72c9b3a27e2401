"""A checkpoint as it would be loaded, read without loading a model: its quantized modules, and what is wrong with it.

The same rules as in ``from_pretrained``, by the same functions: the layers of the model that config.json describes are
looked up among the tensors. Where no class of transformers fits, the tensors are taken for themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from gptq_backend import CheckpointError, GPTQError, QuantEmbedding, QuantizeConfig, StoredSpec, TiedHead
from gptq_backend.format import (
    ForeignLayer,
    Manifest,
    TensorInfo,
    as_gptq,
    checkpoint_files,
    read_manifest,
    read_settings,
    read_tensor,
    resolve,
    resolve_specs,
)
from gptq_backend.model import linear_shapes
from gptq_transformers.loading.checkpoint_names import checkpoint_names
from gptq_transformers.loading.checks import absent, check_loaded, check_stored
from gptq_transformers.loading.prepare import prepare_model
from gptq_transformers.loading.skeleton import UnknownModel, build_skeleton
from gptq_transformers.quantized_layers import quant_linears


@dataclass
class Layer:
    """One quantized module. ``claimed`` is its spec by headers and config, ``spec`` also by its values."""

    name: str
    claimed: StoredSpec
    spec: StoredSpec


@dataclass
class Checkpoint:
    """A checkpoint's files, read as far as inspection needs them; all names are the files'."""

    folder: Path
    settings: Mapping[str, Any]
    config: QuantizeConfig
    files: Sequence[Path]
    manifest: Manifest
    layers: list[Layer] = field(default_factory=list)
    damaged: dict[str, str] = field(default_factory=dict)  # what keeps modules, or the whole, from being loaded
    skipped: list[str] = field(default_factory=list)
    unbiased: Collection[str] = ()  # quantized modules that the model has without a bias
    looked_up: Collection[str] = ()  # quantized embeddings that no output embedding multiplies by
    unknown: str = ""  # why the model's structure is not known; "" if it is

    @property
    def layouts(self) -> list[str]:
        """Those of other tools, in which layers are stored."""
        files = (info.file for info in self.manifest.values())
        return sorted({file.layout.name for file in files if isinstance(file, ForeignLayer)})


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Settings, headers and the small tensors of the checkpoint in folder ``path``.

    Raises:
        GPTQError: no such folder, no settings, unreadable files, or a format that is refused by name.
    """
    folder = Path(path)
    if not folder.is_dir():
        raise GPTQError(f"{path} is not a folder; expected one with a quantized checkpoint")
    settings = read_settings(folder)
    config = QuantizeConfig.from_dict(settings)
    files = checkpoint_files(folder, settings)
    checkpoint = Checkpoint(folder, settings, config, files, as_gptq(read_manifest(files), config))
    modules = _modules(checkpoint.manifest)
    if not modules:
        raise CheckpointError(
            f"{path} has quantization settings, but none of its {len(checkpoint.manifest)} tensors is a qweight; it is "
            "not quantized, or in another format"
        )
    with _quiet():
        found = _as_the_model_reads(checkpoint, modules)
        for name, tensors in modules.items():
            _read_module(checkpoint, name, tensors, found)
    return checkpoint


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the loader's warnings, some one per module: the caller sums them up."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _modules(manifest: Manifest) -> dict[str, Manifest]:
    """The tensors of each module that has one of GPTQ's, by its name in the file."""
    modules: dict[str, Manifest] = {}
    for name, info in manifest.items():
        modules.setdefault(name.rpartition(".")[0], {})[name] = info
    parts = ("qweight", "qzeros", "g_idx")
    return {name: found for name, found in modules.items() if any(f"{name}.{part}" in found for part in parts)}


_Found = dict[str, tuple[StoredSpec, dict[str, TensorInfo]]]


def _as_the_model_reads(checkpoint: Checkpoint, modules: Mapping[str, Manifest]) -> _Found | None:
    """Spec and tensors, by part, of each module that the model has; None if its structure is not known."""
    manifest = checkpoint.manifest
    try:
        model = build_skeleton(checkpoint.folder, manifest)
    except UnknownModel as error:
        checkpoint.unknown = str(error)
        return None
    except CheckpointError as error:
        checkpoint.unknown = checkpoint.damaged["config.json"] = str(error)
        return None
    try:
        names = checkpoint_names(model, manifest)
    except CheckpointError as error:  # experts that nobody knows: nothing more can be said of the model's layers
        checkpoint.damaged["checkpoint"] = str(error)
        return None
    own = {name: names.of.get(f"{name}.qweight", "").removesuffix(".qweight") for name in modules}
    unbiased = {name for name, module in model.named_modules() if getattr(module, "bias", 0) is None}
    checkpoint.unbiased = {name for name, key in own.items() if key in unbiased}
    specs: dict[str, StoredSpec] = {}
    try:
        plan = prepare_model(model, manifest, checkpoint.config, names)
        specs = {name: layer.stored_spec for name, layer in quant_linears(model)} | plan.dense
        check_loaded(model, absent(model, plan.manifest, plan.dense))
        check_stored(plan.dtypes, plan.manifest)
    except CheckpointError as error:
        checkpoint.damaged["checkpoint"] = str(error)
        specs = specs or {name: layer.stored_spec for name, layer in quant_linears(model)}
        if not specs:
            specs = _one_by_one(checkpoint, model, modules, names.of)
    multiplied = {module.embedding for module in model.modules() if isinstance(module, TiedHead)}
    looked_up = {
        name
        for name, module in model.named_modules()
        if isinstance(module, QuantEmbedding) and module not in multiplied
    }
    checkpoint.looked_up = {name for name, key in own.items() if key in looked_up}
    by_model = {names.of[key]: info for key, info in manifest.items()}
    return {
        name: (spec, {part: by_model[f"{own[name]}.{part}"] for part in spec.shapes})
        for name in modules
        if (spec := specs.get(own[name])) is not None
    }


def _one_by_one(
    checkpoint: Checkpoint, model: nn.Module, modules: Mapping[str, Manifest], names: Mapping[str, str]
) -> dict[str, StoredSpec]:
    """Specs of the modules that can be used, one bad module hiding no other."""
    shapes = linear_shapes(model)
    found: dict[str, StoredSpec] = {}
    biased = {name for name in shapes if model.get_submodule(name).bias is not None}
    for name, tensors in modules.items():
        try:
            found |= resolve_specs(
                {names[key]: info for key, info in tensors.items()}, checkpoint.config, shapes, biased
            )
        except CheckpointError as error:
            checkpoint.damaged.pop("checkpoint", None)
            checkpoint.damaged[name] = str(error)
    return found


def _read_module(checkpoint: Checkpoint, name: str, tensors: Manifest, found: _Found | None) -> None:
    """Add the module to ``layers``, ``skipped`` or ``damaged``."""
    try:
        if found is None:
            claimed = resolve_specs(tensors, checkpoint.config)[name]
            parts = {part: tensors[f"{name}.{part}"] for part in claimed.shapes}
        elif name in found:
            claimed, parts = found[name]
        else:
            if name not in checkpoint.damaged:
                checkpoint.skipped.append(name)
            return
        values = {part: read_tensor(info) for part, info in parts.items() if part != "qweight"}
        checkpoint.layers.append(Layer(name, claimed, resolve(claimed, values, name)))
    except CheckpointError as error:
        checkpoint.damaged[name] = str(error)
