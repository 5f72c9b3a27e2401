"""Who serves a GPTQ checkpoint, or one of AWQ, AutoRound or compressed-tensors: this plugin, or vLLM's built-in method.

By ``--quantization gptq``, this plugin serves all that it can read. Without a word from the user, it serves GPTQ on
CPUs and where the built-in would refuse; the other formats on CPUs only, as elsewhere the built-in serves them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gptq_backend import ConfigError, QuantizeConfig, foreign_settings

from .compat import current_platform, init_logger

logger = init_logger(f"vllm.{__name__}")

METHODS = ("gptq", "gptq_backend")  # the names that the plugin is registered under
_BUILT_IN_GROUP_SIZES = (-1, 32, 64, 128)
_BUILT_IN_BITS = (4, 8)


def asks_for_gptq(settings: Mapping[str, Any], requested: str | None) -> bool:
    """Whether this plugin may take a checkpoint, by its ``quantization_config`` and the user's ``--quantization``."""
    # AutoGPTQ wrote no method at first; then it is the user's word that counts.
    method = settings.get("quant_method") or settings.get("method") or requested
    known = str(method).lower().removeprefix("intel/") in (*METHODS, *foreign_settings.METHODS)
    return known and requested in (None, *METHODS)


def serves(settings: Mapping[str, Any], requested: str | None) -> bool:
    """Whether this plugin takes a checkpoint of which :func:`asks_for_gptq` is true.

    Logs the decision and its reason once per process.
    """
    method = foreign_settings.method_of(settings)
    if requested is not None:
        reason = f"--quantization {requested} asks for it"
    elif method != "gptq" and (not current_platform.is_cpu() or not _readable(settings)):
        return False
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
    logger.info_once("gptq-backend serves this checkpoint of %s: %s", method.upper(), reason)
    return True


def _readable(settings: Mapping[str, Any]) -> bool:
    try:
        QuantizeConfig.from_dict(settings)
    except ConfigError:
        return False
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
    return "vLLM's built-in method needs AVX-512 on a CPU"


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
