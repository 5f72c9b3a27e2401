"""vLLM plugin: GPTQ checkpoints of every kind behind ``vllm serve FOLDER --quantization gptq``.

vLLM calls :func:`register` in every process through the entry point ``vllm.general_plugins``. Nothing is imported
before that, and nothing of vLLM is patched: the plugin registers a quantization config, as vLLM invites plugins to do.
"""

from __future__ import annotations

from typing import Any


def register() -> None:
    """Make this package vLLM's ``gptq`` and ``gptq_backend`` quantization methods. Idempotent."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .who_serves import METHODS, refusing, unsupported_version

    config: type[Any]
    if (reason := unsupported_version()) is None:
        from .config import GPTQBackendConfig as config
    else:
        config = refusing(reason)
    for method in METHODS:
        register_quantization_config(method)(config)
