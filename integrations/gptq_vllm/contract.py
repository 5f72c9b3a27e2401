"""What this plugin needs of vLLM; what the installed one has changed of it is known before a model is loaded.

vLLM keeps no interface stable between releases. A release is served if this table holds in it, whatever its number.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from importlib import import_module
from inspect import Parameter, Signature
from typing import Any, Protocol

from .compat import MAP_NAME, NAMES

_LAYERS = "vllm.model_executor.layers"

# What the plugin does not name, but has instances of or relies on.
_UNNAMED = {
    "ExpertMapManager": f"{_LAYERS}.fused_moe.expert_map_manager",
    "ForwardContext": "vllm.forward_context",
    "FusedMoEConfig": f"{_LAYERS}.fused_moe.config",
    "FusedMoEParallelConfig": f"{_LAYERS}.fused_moe.config",
    "LayerReloadingInfo": "vllm.model_executor.model_loader.reload.types",
    "LoadConfig": "vllm.config.load",
    "MergedColumnParallelLinear": f"{_LAYERS}.linear",
    "MoERunner": f"{_LAYERS}.fused_moe",
    "ModelConfig": "vllm.config",
    "VllmConfig": "vllm.config",
    "get_layer_size": "vllm.model_executor.model_loader.reload.utils",
}
MODULES = {**NAMES, **_UNNAMED}

# (class, method): the parameters that vLLM calls our method with. ** at the end: ours takes any others too.
HOOKS: dict[tuple[str, str], str] = {
    ("QuantizationConfig", "from_config"): "config",
    ("QuantizationConfig", "override_quantization_method"): "hf_quant_cfg, user_quant, hf_config",
    ("QuantizationConfig", "maybe_update_config"): "model_name, hf_config, revision",
    ("QuantizationConfig", "apply_vllm_mapper"): "hf_to_vllm_mapper",
    ("QuantizationConfig", "get_checkpoint_weight_mapper"): "",
    ("QuantizationConfig", "get_config_filenames"): "",
    ("QuantizationConfig", "get_min_capability"): "",
    ("QuantizationConfig", "get_name"): "",
    ("QuantizationConfig", "get_quant_method"): "layer, prefix",
    ("QuantizationConfig", "get_supported_act_dtypes"): "",
    ("LinearMethodBase", "create_weights"): "layer, input_size_per_partition, output_partition_sizes, input_size, "
    "output_size, params_dtype, **",
    ("LinearMethodBase", "apply"): "layer, x, bias",
    ("LinearMethodBase", "process_weights_after_loading"): "layer",
    ("LinearMethodBase", "tie_weights"): "layer, embed_tokens",
    ("FusedMoEMethodBase", "create_weights"): "layer, num_experts, hidden_size, intermediate_size_per_partition, "
    "params_dtype, **",
    ("FusedMoEMethodBase", "apply"): "layer, x, topk_weights, topk_ids, shared_experts, shared_experts_input",
    ("FusedMoEMethodBase", "process_weights_after_loading"): "layer",
    ("FusedMoEMethodBase", "get_fused_moe_quant_config"): "layer",
}

# (class or "", names of the function, of which one exists; "" for the class itself): what we call it with. After *: by
# keyword.
CALLS: dict[tuple[str, tuple[str, ...]], str] = {
    ("", ("register_quantization_config",)): "quantization",
    ("", ("get_current_vllm_config",)): "",
    ("", ("get_current_vllm_config_or_none",)): "",
    ("", ("get_forward_context",)): "",
    ("", ("register_weight_loader_v2_supported_method",)): "cls",
    ("", ("UnquantizedLinearMethod",)): "",
    ("", ("UnquantizedFusedMoEMethod",)): "moe",
    ("", ("download_weights_from_hf",)): "model_name_or_path, cache_dir, allow_patterns, revision, *, ignore_patterns",
    ("", ("get_layer_size",)): "layer",  # by which a reload counts
    ("", ("get_layerwise_info",)): "layer",
    ("", ("initialize_online_processing",)): "layer",
    ("", ("restore_layer_on_meta",)): "layer, info",
    ("LayerReloadingInfo", ("can_load",)): "",
    ("", ("set_weight_attrs",)): "weight, weight_attrs",
    ("", ("ModelWeightParameter",)): "*, data, input_dim, output_dim, weight_loader",
    ("", ("WeightsMapper",)): "*, orig_to_new_renaming, orig_to_new_prefix",
    ("WeightsMapper", MAP_NAME): "key",
    ("FusedMoEMethodBase", ("__init__",)): "moe",
    ("ExpertMapManager", ("map_global_to_local",)): "global_id",
    ("FusedMoEQuantConfig", ("make",)): "*, gemm1_alpha, gemm1_beta, gemm1_clamp_limit",
    ("ApplyMoEActivationConfig", ("from_configs",)): "moe_config, quant_config",
    ("", ("apply_moe_activation_supported",)): "activation",
    ("", ("apply_moe_activation",)): "activation, output, input, *, activation_config",
    ("", ("direct_register_custom_op",)): "op_name, op_func, *, fake_impl, target_lib",
}

# Attributes that we read, or that vLLM reads of what we give it.
ATTRIBUTES = {
    "QuantizationConfig": "packed_modules_mapping",
    "VllmConfig": "additional_config load_config lora_config model_config",
    "ModelConfig": "enforce_eager model",
    "LayerReloadingInfo": "loaded_weights",
    "LoadConfig": "download_dir ignore_patterns load_format",
    "WeightsMapper": "rename_source_key",
    "LinearBase": "prefix tp_rank tp_size",
    "MergedColumnParallelLinear": "has_bias output_sizes weight_loader_v2",
    "QKVParallelLinear": "total_num_heads total_num_kv_heads head_size v_head_size",
    "ParallelLMHead": "org_vocab_size tp_rank tp_size",
    "VocabParallelEmbedding": "embedding_dim org_vocab_size tp_rank tp_size",
    "RoutedExperts": "ckpt_gate_proj_name ckpt_up_proj_name ckpt_down_proj_name layer_name moe_config activation "
    "swiglu_alpha swiglu_beta swiglu_limit apply_router_weight_on_input expert_map expert_map_manager "
    "local_num_experts global_num_experts",
    "FusedMoEConfig": "has_bias moe_parallel_config",
    "FusedMoEParallelConfig": "tp_rank tp_size",
    "ApplyMoEActivationConfig": "alpha beta clamp_limit",
    "MoEActivation": "is_gated",
    "MoERunner": "routed_experts",
    "ForwardContext": "no_compile_layers",
    "LayerName": "value",
}


class Tree(Protocol):
    """A vLLM to look into, by module and name."""

    def has(self, module: str, name: str) -> bool:
        """Whether ``module`` exists and has ``name``."""

    def signature(self, module: str, owner: str, name: str) -> Signature | None:
        """Of a function or class of ``module``, or of the method of its class ``owner`` (then without self); None if
        there is none.
        """

    def mentions(self, module: str, name: str) -> set[str]:
        """Attributes that class ``name`` or one of its bases has, or that one of its methods uses."""


def differences(tree: Tree) -> list[str]:
    """What does not hold in ``tree``, in a few words each; empty if it can be served."""
    gone = {name: module for name, module in MODULES.items() if not tree.has(module, name)}
    found = [f"{module}.{name} is gone" for name, module in gone.items()]
    hooks = {(owner, (name,)): (wanted, _hook) for (owner, name), wanted in HOOKS.items()}
    calls = {use: (wanted, _call) for use, wanted in CALLS.items()}
    for (owner, names), (wanted, rule) in (*hooks.items(), *calls.items()):
        if (owner or names[0]) in gone:
            continue
        module = MODULES[owner or names[0]]
        signatures = (tree.signature(module, owner, name) for name in names)
        signature = next((each for each in signatures if each is not None), None)
        label = f"{owner}.{names[0]}".lstrip(".")
        if signature is None:
            found.append(f"{label} is gone")
        elif not rule(list(signature.parameters.values()), _split(wanted)):
            found.append(f"{label}{_shown(signature)} is not ({wanted})")
    for owner, attributes in ATTRIBUTES.items():
        if owner not in gone:
            known = tree.mentions(MODULES[owner], owner)
            found += [f"{owner}.{name} is gone" for name in attributes.split() if name not in known]
    return found


def _hook(found: list[Parameter], wanted: list[str]) -> bool:
    """Whether our method, which takes ``wanted``, can be called like vLLM's."""
    names = [each.name for each in found if each.kind not in _ANY]
    return names[: len(wanted) - 1] == wanted[:-1] if wanted[-1:] == ["**"] else names == wanted


def _call(found: list[Parameter], wanted: list[str]) -> bool:
    """Whether vLLM's function takes ``wanted`` and needs nothing else."""
    cut = wanted.index("*") if "*" in wanted else len(wanted)
    by_position, by_name = wanted[:cut], wanted[cut + 1 :]
    named = [each for each in found if each.kind not in _ANY]
    rest = named[len(by_position) :]
    takes_any = any(each.kind is Parameter.VAR_KEYWORD for each in found)
    return (
        [each.name for each in named[: len(by_position)]] == by_position
        and (takes_any or {*by_name} <= {each.name for each in rest})
        and all(each.name in by_name for each in rest if each.default is Parameter.empty)
    )


_ANY = (Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD)


def _split(parameters: str) -> list[str]:
    return parameters.split(", ") if parameters else []


def _shown(signature: Signature) -> str:
    return f"({', '.join(signature.parameters)})"


class InstalledTree:
    """The vLLM that this process runs."""

    def has(self, module: str, name: str) -> bool:
        """See :class:`Tree`."""
        try:
            return hasattr(import_module(module), name)
        except Exception:  # whatever a module does not survive
            return False

    def signature(self, module: str, owner: str, name: str) -> Signature | None:
        """See :class:`Tree`."""
        holder = getattr(import_module(module), owner) if owner else import_module(module)
        function = getattr(holder, name, None)
        if function is None:
            return None
        signature = inspect.signature(function)
        return without_self(signature) if owner else signature

    def mentions(self, module: str, name: str) -> set[str]:
        """See :class:`Tree`."""
        return set(_mentions(getattr(import_module(module), name)))


def without_self(signature: Signature) -> Signature:
    """``signature`` of a method as its callers see it."""
    parameters = list(signature.parameters.values())
    own = bool(parameters) and parameters[0].name in ("self", "cls")
    return Signature(parameters[own:])


def _mentions(cls: type[Any]) -> Iterator[str]:
    for base in cls.__mro__:
        if base.__module__.startswith("vllm"):
            members: Mapping[str, Any] = vars(base)
            yield from members
            yield from getattr(base, "__annotations__", ())
            yield from _names(members.values())


def _names(members: Iterable[Any]) -> Iterator[str]:
    """Attributes that the code of methods reads or sets."""
    for member in members:
        code = getattr(inspect.unwrap(member), "__code__", None) if callable(member) else None
        yield from getattr(code, "co_names", ())
