"""The step before transformers' weight loader: put QuantLinears where it will look for them."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from gptq_backend import CheckpointError, QuantizeConfig, QuantLinear
from gptq_backend.format import (
    STORED_PARTS,
    TGI_TENSORS,
    Manifest,
    StoredSpec,
    as_gptq,
    by_gptqmodel,
    layer_names,
    quantized_modules,
    renamed,
    resolve_specs,
)
from gptq_backend.model import linear_shapes, replace_module

from ..experts.unfuse import replace_fused_experts
from ..foreign_linear import ForeignLinear
from ..quantized_layers import dtype_of_parameter, untie_quantized
from .checkpoint_names import CheckpointNames
from .checks import check_dense_shapes
from .embeddings import find_embeddings
from .split_layers import split_layers

logger = logging.getLogger(__name__)


@dataclass
class LoadPlan:
    """What has to be remembered from before the weights are loaded until after.

    Args:
        manifest: the checkpoint's tensors by the model's names; of layers in another layout than GPTQ's, also GPTQ's.
        renaming: of experts, beside transformers' own (see ``expert_renaming``).
        renamed: those whose name in the file differs.
        resized: dense ones of another size than the model's, which the user allows and transformers makes anew.
        dtypes: of the model's own parameters, as they should be after loading.
        dense: layers that are quantized in the file but are no linear layers in the model (routers), by name.
        specs: of the quantized layers that are.
    """

    manifest: Manifest
    renaming: dict[str, str] = field(default_factory=dict)
    renamed: set[str] = field(default_factory=set)
    resized: set[str] = field(default_factory=set)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    dense: dict[str, StoredSpec] = field(default_factory=dict)
    specs: dict[str, StoredSpec] = field(default_factory=dict)


def prepare_model(
    model: nn.Module,
    stored: Manifest,
    config: QuantizeConfig,
    names: CheckpointNames,
    backend: str | None = None,
    ignore_mismatched_sizes: bool = False,
) -> LoadPlan:
    """Swap the modules that are quantized in a checkpoint for empty :class:`QuantLinear` on meta, or
    :class:`ForeignLinear` where GPTQ did not store them.

    Args:
        stored: the checkpoint's tensors, by their names in the files.
        names: what the model calls them.

    Raises:
        CheckpointError: the checkpoint's tensors do not fit together or to the model.
    """
    held = {names.of[key]: info for key, info in stored.items()}
    manifest = as_gptq(held, config)
    quantized = quantized_modules(manifest)
    if not quantized:
        raise CheckpointError(
            "config.json says that the model is quantized with GPTQ, but no tensor is called *.qweight; remove "
            "quantization_config from it, or fetch the quantized weights"
        )
    layers = layer_names(manifest)
    replace_fused_experts(model, layers, quantized, halves=by_gptqmodel(config))
    split_layers(model, layers)
    shapes = linear_shapes(model)
    biased = {name for name in shapes if model.get_submodule(name).bias is not None}
    embeddings = {each.name: each for each in find_embeddings(model, manifest, quantized)}
    shapes |= {name: each.shape for name, each in embeddings.items()}
    specs = resolve_specs(manifest, config, shapes, biased)
    renamed_keys = {name for key, name in names.of.items() if key != name}
    plan = LoadPlan({**held, **manifest}, names.renaming, renamed_keys, specs=specs)
    plan.dense = _other_modules(model, manifest, config, [name for name in quantized if name not in specs])
    if not specs and not plan.dense:
        raise CheckpointError(
            f"the model that config.json describes has none of the checkpoint's {len(quantized)} quantized layers "
            f"({quantized[0]}, ...); config.json and the weights belong to different models: fetch both again"
        )
    unused = [f"{name}.{part}" for name in plan.dense for part in STORED_PARTS]
    for name, spec in specs.items():
        if name in embeddings:
            embeddings[name].put(model, spec, backend)
            unused.append(f"{name}.weight")
            continue
        weight: Any = model.get_submodule(name).weight
        dtype = dtype_of_parameter(model, f"{name}.weight", weight.dtype)
        replace_module(model, name, QuantLinear(spec, name, backend, device="meta", dtype=dtype))
        unused += [f"{name}.weight"] if spec.has_bias else [f"{name}.weight", f"{name}.bias"]
    _expect_unused(model, {held[key].key for key in unused if key in held}, stored)
    untie_quantized(model)
    for name in specs:
        if held.get(f"{name}.qweight") is not (first := manifest[f"{name}.qweight"]):
            replace_module(model, name, ForeignLinear(model.get_submodule(name), first.file))
    dense = {key: p for key, p in model.named_parameters() if key.rpartition(".")[0] not in specs}
    plan.dtypes = {key: parameter.dtype for key, parameter in dense.items()}
    if ignore_mismatched_sizes:
        plan.resized = {key for key, p in dense.items() if key in manifest and manifest[key].shape != tuple(p.shape)}
    else:
        check_dense_shapes(model, manifest, dense)
    return plan


def _expect_unused(model: Any, unused: set[str], stored: Iterable[str]) -> None:
    """Keep transformers from warning of the tensors ``unused``, of all that are ``stored``."""
    known = model._keys_to_ignore_on_load_unexpected
    known = [] if known is None else known
    ignored = [rf"(^|\.){name}$" for name in TGI_TENSORS] + name_patterns(unused, stored)
    model._keys_to_ignore_on_load_unexpected = type(known)([*known, *ignored])  # a list in version 4, a set in 5


def name_patterns(chosen: set[str], names: Iterable[str]) -> list[str]:
    """Regular expressions for the ``chosen`` ones of ``names``: one for all that differ only in their numbers, where
    all of these are chosen. transformers tries each pattern on each name, and mixtures have thousands.
    """
    others = {re.sub(r"\d+", "0", name) for name in names if name not in chosen}
    patterns = dict.fromkeys(
        re.escape(name) if kind in others else re.sub(r"\d+", r"\\d+", re.escape(name))
        for name in sorted(chosen)
        for kind in [re.sub(r"\d+", "0", name)]
    )
    return [f"{pattern}$" for pattern in patterns]


def follow_renaming(model: Any, plan: LoadPlan) -> list[Any]:
    """Let transformers load under the names that :func:`prepare_model` found; after it come those of transformers.

    Returns:
        For transformers 5: what to add to its conversions, which ``save_pretrained`` undoes. Version 4 asks ``model``
        for its names, until :func:`finish_model`.
    """
    if not plan.renaming:
        return []
    try:
        from ..experts.renaming import ExpertRenaming
    except ImportError:  # transformers 4
        original = model._get_key_renaming_mapping

        def renaming_mapping(*args: Any, **kwargs: Any) -> Any:
            return {key: renamed(name, plan.renaming) for key, name in original(*args, **kwargs).items()}

        model._get_key_renaming_mapping = renaming_mapping
        return []
    # The file may be that of the base model, which lacks its prefix, or the model may be: both are seen to afterwards.
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    bare = {own.removeprefix(prefix): wanted.removeprefix(prefix) for own, wanted in plan.renaming.items()}
    return [ExpertRenaming({prefix + own: prefix + wanted for own, wanted in bare.items()} | bare | plan.renaming)]


def _other_modules(
    model: nn.Module, manifest: Manifest, config: QuantizeConfig, names: list[str]
) -> dict[str, StoredSpec]:
    """What to do with layers that are quantized in the file and not linear in the model.

    A router of transformers 5 multiplies by a weight of its own: it gets the dequantized weight. A layer that the model
    lacks altogether (a head that the user did not ask for, multi-token prediction) is skipped like any other
    tensor that is too much, unless the model waits for something in its place.
    """
    modules = dict(model.named_modules())
    shapes: dict[str, tuple[int, int]] = {}
    for name in names:
        weight = getattr(modules.get(name), "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            shapes[name] = (weight.shape[1], weight.shape[0])
            logger.warning("%s: %s cannot be quantized; its weight is dequantized", name, type(modules[name]).__name__)
            continue
        parent = name
        while parent and parent not in modules:
            parent = parent.rpartition(".")[0]
        waiting = [key for key, _ in modules[parent].named_parameters(recurse=False)] if parent else []
        if parent == name or any(f"{parent}.{key}" not in manifest for key in waiting):
            raise CheckpointError(
                f"{name} is quantized in the checkpoint, but {type(modules[parent]).__name__} at {parent!r} has no "
                f"linear layer of that name in transformers {transformers.__version__}; this model's layout is not "
                "supported, unless another version of transformers has it"
            )
        logger.info("%s: the model has no such layer; skipped", name)
    return resolve_specs(manifest, config, shapes) if shapes else {}
