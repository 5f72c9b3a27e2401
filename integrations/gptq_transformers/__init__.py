"""GPTQ in transformers: importing this package makes ``from_pretrained`` serve GPTQ checkpoints with gptq_backend.

Those of AWQ, AutoRound and compressed-tensors too, where their own package is missing (``other_formats``).
"""

from __future__ import annotations

from typing import Any

__all__ = ["GPTQConfig", "from_quantized", "merge_adapter", "quantize", "register"]

_LAZY = {
    "GPTQConfig": "config",
    "attach": "hf_quantizer",
    "from_quantized": "load_quantized",
    "merge_adapter": "merging",
    "quantize": "quantize_pretrained",
}


def register() -> None:
    """Put our config and quantizer in the place of transformers' own for ``quant_method: gptq``, and beside it for
    other formats that we can read. Idempotent.

    transformers has two dictionaries and no entry points; its ``register_*`` functions refuse names that exist.
    peft is adapted when it is imported.

    Raises:
        GPTQError: the installed torch or transformers is too old, or transformers has changed what is used of it.
    """
    from gptq_backend import GPTQError

    from .versions import changed, refuse_older

    refuse_older()
    try:
        _register()
    except (ImportError, AttributeError) as error:
        raise GPTQError(changed(error)) from error


def _register() -> None:
    from transformers.quantizers import auto
    from transformers.utils.quantization_config import GPTQConfig as StockGPTQConfig

    from gptq_autoload import watch_peft
    from gptq_autoload.stock_config import relax_config

    from .config import GPTQConfig
    from .hf_quantizer import GPTQBackendQuantizer
    from .other_formats import register_other_formats

    relax_config(StockGPTQConfig)
    auto.AUTO_QUANTIZATION_CONFIG_MAPPING["gptq"] = GPTQConfig
    auto.AUTO_QUANTIZER_MAPPING["gptq"] = GPTQBackendQuantizer
    register_other_formats(auto.AUTO_QUANTIZATION_CONFIG_MAPPING)
    watch_peft()


def __getattr__(name: str) -> Any:
    # The API imports the whole of transformers' modelling code, which loading a model does not need so early.
    if name in _LAZY:
        import importlib

        return getattr(importlib.import_module(f".{_LAZY[name]}", __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


register()
