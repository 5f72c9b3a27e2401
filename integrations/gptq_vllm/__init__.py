"""vLLM plugin: GPTQ checkpoints of every kind behind ``vllm serve FOLDER --quantization gptq``.

vLLM calls :func:`register` in every process through the entry point ``vllm.general_plugins``. Nothing is imported
before that, and nothing of vLLM is patched: the plugin registers a quantization config, as vLLM invites plugins to do.
"""

from __future__ import annotations


def register() -> None:
    """Make this package vLLM's ``gptq`` and ``gptq_backend`` quantization methods. Idempotent.

    Never raises: vLLM starts for every other model, whatever keeps this plugin from serving.
    """
    try:
        from .registration import register_methods

        register_methods()
    except Exception as error:
        import logging

        logging.getLogger(f"vllm.{__name__}").error(
            "gptq-backend is not registered, and vLLM serves GPTQ checkpoints by itself or not at all: vLLM's plugin "
            "interface was expected, and gave %s: %s; install vLLM 0.30 or newer, or a newer gptq-backend",
            type(error).__name__,
            error,
        )
