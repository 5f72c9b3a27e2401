"""Adapters on experts that are quantized one by one, where peft expects those that transformers 5 fuses."""

from __future__ import annotations

import functools
from typing import Any

from torch import nn

from gptq_transformers.experts.conversions import drop_fused_conversions
from gptq_transformers.experts.expert_list import ExpertList


@functools.cache
def keep_experts_apart() -> None:
    """Let peft take the names of such experts as they are: in ``target_modules``, and in an adapter's file.

    For the models whose experts transformers 5 fuses, it turns "gate_proj" into the parameter "gate_up_proj", which
    these models do not have. Call it after peft has been imported; peft below 0.19 has nothing of this.
    """
    try:
        from peft.utils import transformers_weight_conversion as conversion
    except ImportError:  # or transformers 4
        return
    convert_config, mapping = conversion.convert_peft_config_for_transformers, conversion.get_model_conversion_mapping

    @functools.wraps(convert_config)
    def convert_peft_config_for_transformers(peft_config: Any, model: nn.Module, *args: Any, **kwargs: Any) -> None:
        if not any(isinstance(module, ExpertList) for module in model.modules()):
            convert_config(peft_config, model, *args, **kwargs)

    @functools.wraps(mapping)
    def get_model_conversion_mapping(model: nn.Module, *args: Any, **kwargs: Any) -> list[Any]:
        return drop_fused_conversions(mapping(model, *args, **kwargs), model)

    conversion.convert_peft_config_for_transformers = convert_peft_config_for_transformers
    conversion.get_model_conversion_mapping = get_model_conversion_mapping
