"""The step after transformers' weight loader: restore what it cast, check that it found everything, prepare kernels."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from gptq_backend import QuantLinear
from gptq_backend.format import Manifest, read_packed, read_tensor
from gptq_backend.module_moves import offloading_hook

from ..experts.unfuse import group_experts
from ..foreign_linear import translate_layers
from ..quantized_layers import dtype_of_parameter, quant_linears
from .checks import check_finite, check_loaded, not_loaded
from .embeddings import keep_dense
from .prepare import LoadPlan


def finish_model(model: nn.Module, plan: LoadPlan) -> None:
    """Restore what the loader cast, check that it found everything, and prepare the layers for their device.

    Raises:
        CheckpointError: values are damaged, or a weight was not in the checkpoint.
        ConfigError: a value does not fit the dtype that was asked for.
    """
    vars(model).pop("_get_key_renaming_mapping", None)
    _load_dense(model, plan)
    check_loaded(model, [key for key in not_loaded(model) if key not in plan.resized])
    translate_layers(model)
    for name, layer in quant_linears(model):
        _restore_dtypes(name, layer, plan.manifest)
        for parameter in layer.parameters():
            parameter.requires_grad_(False)  # transformers makes new ones, with gradients for floats
    keep_dense(model)
    group_experts(model)
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


def _load_dense(model: Any, plan: LoadPlan) -> None:
    for name, spec in plan.dense.items():
        tensors = {part: read_tensor(plan.manifest[f"{name}.{part}"]) for part in spec.shapes if part != "bias"}
        weight = read_packed(spec, tensors, name).unpack().dequantize()
        module = model.get_submodule(name)
        old = module.weight
        device = "cpu" if old.is_meta else old.device
        new: Any = nn.Parameter(weight.to(device, plan.dtypes[f"{name}.weight"]), requires_grad=False)
        new._is_hf_initialized = True
        module.weight = new


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
    weights = getattr(offloading_hook(layer), "weights_map", None)
    loader, key = getattr(weights, "dataset", None), f"{getattr(weights, 'prefix', '')}{part}"
    if loader is not None and key in loader.state_dict and loader.state_dict[key].dtype != dtype:
        loader.state_dict[key] = read_tensor(manifest[f"{name}.{part}"])
    elif loader is not None and "safetensors_file" in loader.index.get(key, {}):
        # transformers 4 has the model's dtype here even for packed integers; without it they come as stored
        loader.index[key] = {k: v for k, v in loader.index[key].items() if k != "dtype"}
    setattr(layer, part, nn.Parameter(getattr(layer, part).to(dtype), requires_grad=False))
