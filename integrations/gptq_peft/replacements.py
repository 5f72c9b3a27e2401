"""What peft's methods do where quantized layers are concerned. Each function gets the original method first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gptq_backend import ConfigError

from .embeddings import found_by_size, free_embeddings
from .linear_view import seen_as_linear
from .merging import merge_onto_dense, refuse_merging_in_place
from .quantized import adapted_layers, base_of, has_quantized
from .trained_copies import dense_copy


def put_on(original: Any, tuner: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
    """``BaseTuner.__init__`` and ``inject_adapter``, which look for layers to put adapters on."""
    if not has_quantized(model):
        return original(tuner, model, *args, **kwargs)
    configs = vars(tuner).get("peft_config") or {}
    _refuse_qalora(configs)
    free_embeddings(model, configs)
    with seen_as_linear(model):
        return original(tuner, model, *args, **kwargs)


def _refuse_qalora(configs: Mapping[str, Any]) -> None:
    for config in configs.values():
        if getattr(config, "use_qalora", False):
            raise ConfigError(
                "use_qalora=True works with gptqmodel's layers only, and peft would ignore it here without a word; "
                "leave it out"
            )


def set_up_prompts(original: Any, peft_model: Any, *args: Any, **kwargs: Any) -> Any:
    """``PeftModel._setup_prompt_encoder``, which looks for the embedding of tokens."""
    with found_by_size(peft_model):
        return original(peft_model, *args, **kwargs)


def merge_in_place(original: Any, tuner: Any, *args: Any, **kwargs: Any) -> Any:
    """``BaseTuner.merge_adapter``."""
    refuse_merging_in_place(tuner)
    return original(tuner, *args, **kwargs)


def unload(original: Any, tuner: Any, merge: bool = True, *args: Any, **kwargs: Any) -> Any:
    """A tuner's ``_unload_and_optionally_merge``."""
    if not merge or not any(adapted_layers(tuner)):
        return original(tuner, merge, *args, **kwargs)
    return merge_onto_dense(original, tuner, *args, **kwargs)


def weight_of(original: Any, tuner_layer: Any) -> Any:
    """``BaseTunerLayer.weight``; peft gives the packed words, to whose dtype T5 would cast its activations."""
    layer = base_of(tuner_layer)
    return original(tuner_layer) if layer is None else layer.weight


def put_trained_copy(original: Any, wrapper: Any, adapter_name: str, *args: Any, **kwargs: Any) -> None:
    """``ModulesToSaveWrapper.update``; peft's own copy would have packed integers, which have no gradients."""
    if adapter_name not in wrapper.modules_to_save and has_quantized(wrapper.original_module):
        wrapper.modules_to_save[adapter_name] = dense_copy(wrapper.original_module)
    original(wrapper, adapter_name, *args, **kwargs)


def switch_trained_copy(original: Any, wrapper: Any, enabled: bool) -> None:
    """``ModulesToSaveWrapper.enable_adapters``; peft < 0.18 lets the module below be trained while the copy is off."""
    if enabled or not has_quantized(wrapper.original_module):
        original(wrapper, enabled)
        return
    wrapper._disable_adapters = True
    wrapper.modules_to_save.requires_grad_(False)
