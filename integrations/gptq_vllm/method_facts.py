"""What vLLM asks of a quantization method by name, before and after it has a checkpoint."""

from __future__ import annotations

import torch

from .compat import QuantizationConfig


class MethodFacts(QuantizationConfig):
    """The answers that do not depend on a checkpoint."""

    def get_name(self) -> str:
        """What vLLM's own tables, such as those of its performance metrics, know the method by."""
        return "gptq"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.half, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 60

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json"]
