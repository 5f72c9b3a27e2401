"""What stands in for the plugin in a vLLM that it was not tested with: a refusal for whoever asks for it by name."""

from __future__ import annotations

from typing import Any

from vllm.logger import init_logger
from vllm.model_executor.layers.quantization.auto_gptq import AutoGPTQConfig

from gptq_backend import ConfigError

logger = init_logger(f"vllm.{__name__}")


def refusing(reason: str) -> type[AutoGPTQConfig]:
    """A config that raises ``reason`` when it is asked for; without a request the built-in serves as if alone."""

    class UnsupportedVersion(AutoGPTQConfig):
        @classmethod
        def override_quantization_method(
            cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
        ) -> None:
            if user_quant in ("gptq", "gptq_backend"):
                raise ConfigError(f"--quantization {user_quant}: {reason}, or use --quantization auto_gptq")
            if str(hf_quant_cfg.get("quant_method")).lower() == "gptq":
                logger.warning_once("The built-in GPTQ serves this checkpoint: %s", reason)

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> AutoGPTQConfig:
            raise ConfigError(reason)

    return UnsupportedVersion
