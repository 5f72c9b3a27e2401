"""What vLLM finds under this plugin's names before it knows whether a model is quantized with GPTQ."""

from __future__ import annotations

from typing import Any

from gptq_backend import ConfigError

from .compat import init_logger, register_quantization_config, vllm_version
from .gate import too_old, untested, why_not
from .method_facts import MethodFacts
from .who_serves import METHODS, asks_for_gptq, serves

logger = init_logger(f"vllm.{__name__}")


class GPTQMethod(MethodFacts):
    """The quantization method; it becomes a ``GPTQBackendConfig`` for a checkpoint that this plugin serves.

    It refuses GPTQ checkpoints with a sentence where the installed vLLM cannot be served. The check, and the imports
    of everything else, wait until there is such a checkpoint.
    """

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """``gptq``, under which this class is registered, when this plugin serves the checkpoint.

        Raises:
            ConfigError: the user asked for it, and the installed vLLM cannot be served.
        """
        if not asks_for_gptq(hf_quant_cfg, user_quant):
            return None
        if (reason := _refusal()) is not None:
            if user_quant is not None:
                raise ConfigError(f"--quantization {user_quant}: {reason}")
            logger.warning_once("%s", reason)
            return None
        return "gptq" if serves(hf_quant_cfg, user_quant) else None

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> Any:
        """The ``GPTQBackendConfig`` of a checkpoint's ``quantization_config``.

        Raises:
            ConfigError: settings that cannot be served, or a vLLM that cannot be.
        """
        if (reason := _refusal()) is not None:
            raise ConfigError(reason)
        from .config import GPTQBackendConfig

        return GPTQBackendConfig(config)


def _refusal() -> str | None:
    """Why GPTQ checkpoints are refused here, or None; then a vLLM newer than tested is warned about."""
    reason = why_not()
    if reason is None and (warning := untested(vllm_version())) is not None:
        logger.warning_once("%s", warning)
    return reason


def register_methods() -> None:
    """Register :class:`GPTQMethod`; a vLLM that is too old is named at once."""
    if (reason := too_old(vllm_version())) is not None:
        logger.warning_once("GPTQ checkpoints are refused: %s", reason)
    for method in METHODS:
        register_quantization_config(method)(GPTQMethod)
