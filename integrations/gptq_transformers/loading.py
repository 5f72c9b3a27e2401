"""The steps around transformers' own weight loader: put QuantLinears where it looks for them, and check after it."""

from __future__ import annotations

import functools
import logging
import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from gptq_backend import CheckpointError, QuantizeConfig, QuantLinear
from gptq_backend.format import (
    TGI_TENSORS,
    Manifest,
    StoredSpec,
    layer_names,
    quantized_modules,
    read_packed,
    read_tensor,
    renamed,
    resolve_specs,
)
from gptq_backend.model import linear_shapes, replace_module

from .checkpoint_names import CheckpointNames
from .experts import unfuse as experts
from .finite import check_finite
from .split_layers import split_layers

logger = logging.getLogger(__name__)


@dataclass
class Plan:
    """What has to be remembered from before the weights are loaded until after.

    Args:
        manifest: the checkpoint's tensors by the model's names.
        renaming: of experts, beside transformers' own (see ``expert_renaming``).
        renamed: those whose name in the file differs.
        resized: dense ones of another size than the model's, which the user allows and transformers makes anew.
        dtypes: of the model's own parameters, as they should be after loading.
        dense: layers that are quantized in the file but are no linear layers in the model (routers), by name.
    """

    manifest: Manifest
    renaming: dict[str, str] = field(default_factory=dict)
    renamed: set[str] = field(default_factory=set)
    resized: set[str] = field(default_factory=set)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    dense: dict[str, StoredSpec] = field(default_factory=dict)


def prepare_model(
    model: nn.Module,
    stored: Manifest,
    config: QuantizeConfig,
    names: CheckpointNames,
    backend: str | None = None,
    ignore_mismatched_sizes: bool = False,
) -> Plan:
    """Swap the modules that are quantized in a checkpoint for empty :class:`QuantLinear` on meta.

    Args:
        model: a ``PreTrainedModel`` without weights.
        stored: the checkpoint's tensors, by their names in the files.
        config: its settings.
        names: what the model calls them.
        backend: row of the kernel table, or None.
        ignore_mismatched_sizes: what the user passed to ``from_pretrained``.

    Raises:
        CheckpointError: the checkpoint's tensors do not fit together or to the model.
    """
    manifest = {names.of[key]: info for key, info in stored.items()}
    quantized = quantized_modules(manifest)
    if not quantized:
        raise CheckpointError(
            "config.json says that the model is quantized with GPTQ, but no tensor is called *.qweight; remove "
            "quantization_config from it, or fetch the quantized weights"
        )
    layers = layer_names(manifest)
    experts.replace_fused_experts(model, layers, quantized, halves=_by_gptqmodel(config))
    split_layers(model, layers)
    shapes = linear_shapes(model)
    biased = {name for name in shapes if model.get_submodule(name).bias is not None}
    specs = resolve_specs(manifest, config, shapes, biased)
    plan = Plan(manifest, names.renaming, renamed={name for key, name in names.of.items() if key != name})
    plan.dense = _other_modules(model, manifest, config, [name for name in quantized if name not in specs])
    if not specs and not plan.dense:
        raise CheckpointError(
            f"the model that config.json describes has none of the checkpoint's {len(quantized)} quantized layers "
            f"({quantized[0]}, ...); config.json and the weights belong to different models: fetch both again"
        )
    ignored = [rf"(^|\.){name}$" for name in TGI_TENSORS]
    unused = [f"{name}.{part}" for name in plan.dense for part in ("qweight", "qzeros", "scales", "g_idx")]
    for name, spec in specs.items():
        weight: Any = model.get_submodule(name).weight
        dtype = dtype_of_parameter(model, f"{name}.weight", weight.dtype)
        replace_module(model, name, QuantLinear(spec, name, backend, device="meta", dtype=dtype))
        unused += [f"{name}.weight"] if spec.has_bias else [f"{name}.weight", f"{name}.bias"]
    ignored += name_patterns({manifest[key].key for key in unused if key in manifest}, stored)
    known = model._keys_to_ignore_on_load_unexpected
    known = [] if known is None else known
    model._keys_to_ignore_on_load_unexpected = type(known)([*known, *ignored])  # a list in version 4, a set in 5
    untie_quantized(model)
    dense = {key: p for key, p in model.named_parameters() if key.rpartition(".")[0] not in specs}
    plan.dtypes = {key: parameter.dtype for key, parameter in dense.items()}
    if ignore_mismatched_sizes:
        plan.resized = {key for key, p in dense.items() if key in manifest and manifest[key].shape != tuple(p.shape)}
    else:
        _check_dense_shapes(model, manifest, dense)
    return plan


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


def follow_renaming(model: nn.Module, plan: Plan) -> list[Any]:
    """Let transformers load under the names that :func:`prepare_model` found; after it come those of transformers.

    Returns:
        For transformers 5: what to add to its conversions, which ``save_pretrained`` undoes. Version 4 asks ``model``
        for its names, until :func:`finish_model`.
    """
    if not plan.renaming:
        return []
    try:
        from .experts.renaming import ExpertRenaming
    except ImportError:  # transformers 4
        original = model._get_key_renaming_mapping

        def renaming_mapping(*args: Any, **kwargs: Any) -> Any:
            return {key: renamed(name, plan.renaming) for key, name in original(*args, **kwargs).items()}  # type: ignore[operator]

        model._get_key_renaming_mapping = renaming_mapping  # type: ignore[assignment]
        return []
    # The file may be that of the base model, which lacks its prefix, or the model may be: both are seen to afterwards.
    prefix = f"{model.base_model_prefix}." if getattr(model, "base_model_prefix", "") else ""
    bare = {own.removeprefix(prefix): wanted.removeprefix(prefix) for own, wanted in plan.renaming.items()}
    return [ExpertRenaming({prefix + own: prefix + wanted for own, wanted in bare.items()} | bare | plan.renaming)]


def finish_model(model: nn.Module, plan: Plan) -> None:
    """Restore what the loader cast, check that it found everything, and prepare the layers for their device.

    Raises:
        CheckpointError: values are damaged, or a weight was not in the checkpoint.
        ConfigError: a value does not fit the dtype that was asked for.
    """
    vars(model).pop("_get_key_renaming_mapping", None)
    _load_dense(model, plan)
    check_loaded(model, [key for key in not_loaded(model) if key not in plan.resized])
    for name, layer in quant_linears(model):
        _restore_dtypes(name, layer, plan.manifest)
        for parameter in layer.parameters():
            parameter.requires_grad_(False)  # transformers makes new ones, with gradients for floats
    experts.group_experts(model)
    for _, layer in quant_linears(model):
        if not any(parameter.is_meta for parameter in layer.parameters()):
            layer.prepare()
    for key, parameter in model.named_parameters():
        wanted = plan.dtypes.get(key)
        converted = key in plan.renamed or key not in plan.manifest  # made of tensors of other names
        if converted and wanted is not None and not parameter.is_meta and parameter.dtype != wanted:
            # transformers 5.19 loads what it renamed in the file's dtype when the model is quantized
            parameter.data = parameter.data.to(dtype_of_parameter(model, key, wanted))
    check_finite(model, plan.manifest)


def quant_linears(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """The model's quantized layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


def untie_quantized(model: nn.Module) -> None:
    """Stop transformers from tying the embedding to an output layer that is quantized."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter else None
    for name, layer in quant_linears(model):
        if layer is head:
            # T5 and its kin compute otherwise without the key: there a tied head is only left out below.
            encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
            configs = () if encoder_decoder else (model.config, model.config.get_text_config(decoder=True))
            for config in configs:
                config.tie_word_embeddings = False
            tied = getattr(model, "all_tied_weights_keys", None)  # transformers 5
            if tied is not None:
                model.all_tied_weights_keys = {k: v for k, v in tied.items() if not k.startswith(f"{name}.")}


def absent(model: nn.Module, plan: Plan) -> list[str]:
    """Parameters of a model prepared by :func:`prepare_model` that the files do not have, under any name.

    What transformers ties, makes of other tensors or drops is not among them.
    """
    converters = experts.remaining_converters(model)
    tied = tied_names(model)
    return [
        key
        for key, _ in model.named_parameters()
        if key not in plan.manifest
        and key.removesuffix(".weight") not in plan.dense
        and key not in tied
        and not any(experts.produces(each, key) for each in converters)
    ]


def tied_names(model: nn.Module) -> Collection[str]:
    """Parameters that are another one under a second name."""
    tied: Collection[str] | None = getattr(model, "all_tied_weights_keys", None)  # transformers 5
    if tied is None:
        tied = getattr(model, "_tied_weights_keys", None) or ()
        tied = tied if model.config.get_text_config(decoder=True).tie_word_embeddings else ()
    return tied


def not_loaded(model: nn.Module) -> list[str]:
    """Parameters that transformers 5 did not find and initialised at random; version 4 tells the quantizer itself."""
    if transformers.__version__.startswith("4."):
        return []
    return [
        key
        for key, parameter in model.named_parameters()
        if not (parameter.is_meta or getattr(parameter, "_is_hf_initialized", False))
    ]


def check_loaded(model: nn.Module, missing: Iterable[str]) -> None:
    """Refuse random values in the base model and the output embedding; another head is the user's business.

    Raises:
        CheckpointError: with the first missing tensor.
    """
    optional = [re.compile(pattern) for pattern in getattr(model, "_keys_to_ignore_on_load_missing", None) or []]
    missing = [key for key in missing if not any(pattern.search(key) for pattern in optional)]
    required = _needed(model)
    for key in missing:
        if key.startswith(required):
            raise CheckpointError(
                f"{key} is not in the checkpoint ({len(missing)} of the model's tensors are not), neither quantized "
                "nor dense, and would be random; fetch all of its files, or check that config.json belongs to them"
            )


def _by_gptqmodel(config: QuantizeConfig) -> bool:
    """Whether GPTQModel says that it made the checkpoint."""
    meta = config.extra.get("meta")
    makers = meta.get("quantizer") if isinstance(meta, Mapping) else None
    makers = makers if isinstance(makers, list | tuple) else [makers]
    return any(str(maker).partition(":")[0].lower() == "gptqmodel" for maker in makers)


def _needed(model: nn.Module) -> tuple[str, ...]:
    """Starts of the names of all tensors without which the model would compute nonsense."""
    base = getattr(model, "base_model", model)
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if base is model:
        return ("",)
    wanted = [name for name, module in model.named_modules() if module is base or module is head]
    return tuple(f"{name}." for name in [*wanted, *(name for name, _ in quant_linears(model))])


def allow_casting(model: nn.Module) -> None:
    """Let ``.half()``, ``.float()`` and ``.to(dtype)`` work; transformers refuses them for every quantized model.

    A QuantLinear keeps its stored dtypes and computes in that of its input, so casting the rest is well defined.
    """
    for name in ("half", "float", "to"):
        setattr(model, name, functools.partial(_cast, model, name))


def forbid_casting(model: nn.Module) -> None:
    """Undo :func:`allow_casting`."""
    for name in ("half", "float", "to"):
        if isinstance(getattr(model, name), functools.partial):
            delattr(model, name)


def _cast(model: nn.Module, method: str, *args: Any, **kwargs: Any) -> nn.Module:
    return getattr(nn.Module, method)(model, *args, **kwargs)


def _other_modules(
    model: nn.Module, manifest: Manifest, config: QuantizeConfig, names: list[str]
) -> dict[str, StoredSpec]:
    """What to do with layers that are quantized in the file and not linear in the model.

    A router of transformers 5 multiplies by a weight of its own: it gets the dequantized weight, and so does an
    embedding, which GPTQModel can quantize as if it were multiplied by one-hot rows. A layer that the
    model lacks altogether (a head that the user did not ask for, multi-token prediction) is skipped like any other
    tensor that is too much, unless the model waits for something in its place.
    """
    modules = dict(model.named_modules())
    shapes: dict[str, tuple[int, int]] = {}
    for name in names:
        weight = getattr(modules.get(name), "weight", None)
        if isinstance(weight, Tensor) and weight.dim() == 2:
            rows, columns = weight.shape
            # Its tokens are the input channels.
            shapes[name] = (rows, columns) if isinstance(modules[name], nn.Embedding) else (columns, rows)
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


def _check_dense_shapes(model: nn.Module, manifest: Manifest, parameters: Mapping[str, Tensor]) -> None:
    """Compare before the loader does: transformers 5 compares nothing when the model is quantized."""
    converters = experts.remaining_converters(model)
    for key, parameter in parameters.items():
        stored = manifest.get(key)
        if stored is None or stored.shape == tuple(parameter.shape):
            continue
        if any(
            converter.rename_source_key(name)[1] is not None for converter in converters for name in (key, stored.key)
        ):
            continue  # its stored shape is not that of the model
        raise CheckpointError(
            f"{key}: the checkpoint has shape {list(stored.shape)}, the model {list(parameter.shape)}; config.json and "
            "the weights belong to different models: fetch both again"
        )
    for key, parameter in parameters.items():
        dtype = manifest[key].dtype if key in manifest else None
        if dtype is not None and parameter.is_floating_point() and not dtype.is_floating_point:
            raise CheckpointError(
                f"{key} is stored as {dtype}, expected a floating-point type like torch.float16; the file is damaged "
                "or was changed: fetch it again"
            )


def _load_dense(model: nn.Module, plan: Plan) -> None:
    for name, spec in plan.dense.items():
        tensors = {part: read_tensor(plan.manifest[f"{name}.{part}"]) for part in spec.shapes if part != "bias"}
        weight = read_packed(spec, tensors, name).unpack().dequantize()
        module = model.get_submodule(name)
        if isinstance(module, nn.Embedding):
            weight = weight.t().contiguous()
        old = module.weight
        device = "cpu" if old.is_meta else old.device
        module.weight = nn.Parameter(weight.to(device, plan.dtypes[f"{name}.weight"]), requires_grad=False)
        module.weight._is_hf_initialized = True
    if any(isinstance(model.get_submodule(name), nn.Embedding) for name in plan.dense):
        model.tie_weights()  # type: ignore[operator]


def _restore_dtypes(name: str, layer: QuantLinear, manifest: Manifest) -> None:
    """Read again what the loader cast to the model's dtype: fp16 -> bf16 cannot be undone. transformers 4 casts all."""
    dtypes = layer.stored_spec.dtypes
    for part, parameter in list(layer.named_parameters(recurse=False)):
        if parameter.is_meta:
            _restore_offloaded(name, layer, part, dtypes[part], manifest)
        elif parameter.dtype != dtypes[part]:
            value = read_tensor(manifest[f"{name}.{part}"]).to(parameter.device)
            setattr(layer, part, nn.Parameter(value, requires_grad=False))


def _restore_offloaded(name: str, layer: QuantLinear, part: str, dtype: torch.dtype, manifest: Manifest) -> None:
    hook = getattr(layer, "_hf_hook", None)
    for item in getattr(hook, "hooks", [hook]):
        weights = getattr(item, "weights_map", None)
        loader, key = getattr(weights, "dataset", None), f"{getattr(weights, 'prefix', '')}{part}"
        if loader is None:
            continue
        if key in loader.state_dict and loader.state_dict[key].dtype != dtype:
            loader.state_dict[key] = read_tensor(manifest[f"{name}.{part}"])
        elif "safetensors_file" in loader.index.get(key, {}):
            # transformers 4 has the model's dtype here even for packed integers; without it they come as stored
            loader.index[key] = {k: v for k, v in loader.index[key].items() if k != "dtype"}
    setattr(layer, part, nn.Parameter(getattr(layer, part).to(dtype), requires_grad=False))


def dtype_of_parameter(model: nn.Module, key: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that transformers gives the parameter called ``key`` of a model that is loaded in ``dtype``."""
    kept: list[str] = []
    if dtype in (torch.float16, torch.bfloat16):
        kept += getattr(model, "_keep_in_fp32_modules_strict", None) or []
    if dtype == torch.float16:
        kept += getattr(model, "_keep_in_fp32_modules", None) or []
    return torch.float32 if any(re.search(rf"(^|\.){module}($|\.)", key) for module in kept) else dtype


def restored_classes(model: nn.Module) -> dict[str, type[nn.Module]]:
    """Which class of linear layer each module would have if the model were built anew: GPT-2 has its Conv1D."""
    with torch.device("meta"):
        skeleton = type(model)(model.config)
    return {name: type(module) for name, module in skeleton.named_modules()}
