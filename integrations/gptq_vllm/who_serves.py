"""Who serves a GPTQ checkpoint, this plugin or the method built into vLLM, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from vllm.logger import init_logger
from vllm.platforms import current_platform

from gptq_backend import ConfigError, QuantizeConfig

logger = init_logger(f"vllm.{__name__}")

OURS = ("gptq", "gptq_backend")
_BUILT_IN_GROUP_SIZES = (-1, 32, 64, 128)
_BUILT_IN_BITS = (4, 8)


def serves(settings: Mapping[str, Any], requested: str | None) -> bool:
    """Whether this plugin takes a checkpoint, by its ``quantization_config`` and the user's ``--quantization``.

    Logs the decision and its reason once per process.
    """
    # AutoGPTQ wrote no method at first; then it is the user's word that counts.
    method = settings.get("quant_method") or settings.get("method") or requested
    if str(method).lower() not in OURS or requested not in (None, *OURS):
        return False
    if requested is not None:
        reason = f"--quantization {requested} asks for it"
    elif current_platform.is_cpu():
        reason = "vLLM's built-in GPTQ has no fast kernel for CPUs"
    else:
        reason = refusal(settings)
        if reason is None:
            logger.info_once(
                "vLLM's built-in GPTQ serves this checkpoint, since nothing in its config is beyond it; "
                "--quantization gptq makes gptq-backend serve it"
            )
            return False
        reason = f"vLLM's built-in GPTQ would refuse it: {reason}"
    logger.info_once("gptq-backend serves this GPTQ checkpoint: %s", reason)
    return True


def refusal(settings: Mapping[str, Any]) -> str | None:
    """What the built-in of vLLM 0.32 refuses in a checkpoint's config on a GPU, or None. It sees the config only."""
    try:
        config = QuantizeConfig.from_dict(settings)
    except ConfigError as error:
        return str(error)  # ours says it better
    rules = [(None, config)]
    for pattern, overrides in (config.dynamic or {}).items():
        if not pattern.startswith("-:"):
            rules.append((pattern, QuantizeConfig.from_dict({**settings, **overrides, "dynamic": None})))
    for pattern, rule in rules:
        where = f" in the dynamic rule {pattern!r}" if pattern else ""
        if rule.desc_act and rule.group_size != -1:
            return f"desc_act{where}"
        if not rule.sym:
            return f"asymmetric zeros (sym=false){where}"
        if rule.bits not in _BUILT_IN_BITS:
            return f"{rule.bits} bits{where}"
        if rule.group_size not in _BUILT_IN_GROUP_SIZES:
            return f"group_size={rule.group_size}{where}"
    return None
