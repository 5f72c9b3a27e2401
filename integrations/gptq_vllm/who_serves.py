"""Who serves a GPTQ checkpoint: this plugin, or the method built into vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gptq_backend import ConfigError, QuantizeConfig

from .compat import current_platform, init_logger

logger = init_logger(f"vllm.{__name__}")

METHODS = ("gptq", "gptq_backend")  # the names that the plugin is registered under
_BUILT_IN_GROUP_SIZES = (-1, 32, 64, 128)
_BUILT_IN_BITS = (4, 8)


def asks_for_gptq(settings: Mapping[str, Any], requested: str | None) -> bool:
    """Whether this plugin may take a checkpoint, by its ``quantization_config`` and the user's ``--quantization``."""
    # AutoGPTQ wrote no method at first; then it is the user's word that counts.
    method = settings.get("quant_method") or settings.get("method") or requested
    return str(method).lower() in METHODS and requested in (None, *METHODS)


def serves(settings: Mapping[str, Any], requested: str | None) -> bool:
    """Whether this plugin takes a checkpoint of which :func:`asks_for_gptq` is true.

    Logs the decision and its reason once per process.
    """
    if requested is not None:
        reason = f"--quantization {requested} asks for it"
    elif current_platform.is_cpu():
        reason = _on_a_cpu()
    elif (refused := _refused_by_built_in(settings)) is not None:
        reason = f"vLLM's built-in GPTQ would refuse it: {refused}"
    else:
        logger.info_once(
            "vLLM's built-in GPTQ serves this checkpoint, since nothing in its config is beyond it; "
            "--quantization gptq makes gptq-backend serve it"
        )
        return False
    logger.info_once("gptq-backend serves this GPTQ checkpoint: %s", reason)
    return True


def _on_a_cpu() -> str:
    """Why this plugin serves there, as far as that was measured (docs/vllm.md)."""
    if torch.cpu._is_amx_tile_supported():
        return (
            "on CPUs it is the faster one where both were measured; this CPU has AMX, where they were not, and "
            "--quantization auto_gptq chooses vLLM's built-in GPTQ"
        )
    if torch.backends.cpu.get_cpu_capability() == "AVX512":
        return "with AVX-512 it was measured to be faster than vLLM's built-in GPTQ"
    return "vLLM's built-in GPTQ needs AVX-512 on a CPU"


def _refused_by_built_in(settings: Mapping[str, Any]) -> str | None:
    """What the built-in of vLLM 0.32 refuses in a checkpoint's config on a GPU, or None. It sees the config only."""
    try:
        config = QuantizeConfig.from_dict(settings)
    except ConfigError as error:
        return str(error)  # ours says it better
    rules = {"": config}
    for pattern, overrides in (config.dynamic or {}).items():
        if not pattern.startswith("-:"):
            rules[f" in the dynamic rule {pattern!r}"] = QuantizeConfig.from_dict(
                {**settings, **overrides, "dynamic": None}
            )
    for where, rule in rules.items():
        if rule.desc_act and rule.group_size != -1:
            return f"desc_act{where}"
        if not rule.sym:
            return f"asymmetric zeros (sym=false){where}"
        if rule.bits not in _BUILT_IN_BITS:
            return f"{rule.bits} bits{where}"
        if rule.group_size not in _BUILT_IN_GROUP_SIZES:
            return f"group_size={rule.group_size}{where}"
    return None
