"""Adapters on experts that are quantized one by one, where peft and transformers 5 expect them fused.

For models whose experts transformers 5 fuses, both turn "gate_proj" into the parameter "gate_up_proj": in the names
that a configuration targets, and in an adapter's file. Models with quantized experts have no such parameter, so their
names stay. Each function gets the original one first.
"""

from __future__ import annotations

from typing import Any

from gptq_transformers.experts.conversions import drop_fused_conversions
from gptq_transformers.experts.expert_list import ExpertList


def keep_targets(original: Any, peft_config: Any, model: Any, *args: Any, **kwargs: Any) -> None:
    """``convert_peft_config_for_transformers``."""
    if not any(isinstance(module, ExpertList) for module in model.modules()):
        original(peft_config, model, *args, **kwargs)


def keep_names(original: Any, model: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """``get_model_conversion_mapping``, by which peft and transformers read an adapter's file."""
    return drop_fused_conversions(original(model, *args, **kwargs), model)
