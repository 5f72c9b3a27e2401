"""Who loads checkpoints of AWQ, AutoRound and compressed-tensors in plain ``from_pretrained``: we or their own package.

As with GPTQ, the stock way serves where it can work. Where the package that it needs is missing, gptq_backend serves
what it can read (``gptq_backend/foreign_settings.py``) and leaves the rest, whose error names the package.
:func:`gptq_transformers.from_quantized` always serves with gptq_backend. What was loaded is a GPTQ model: its config
says so, and ``save_pretrained`` writes it as one.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
import transformers

from gptq_autoload.stock_config import is_missing
from gptq_backend import ConfigError, QuantizeConfig

from .config import GPTQConfig

logger = logging.getLogger(__name__)

_OWNERS = {"awq": "gptqmodel", "auto-round": "auto_round", "compressed-tensors": "compressed_tensors"}


def register_other_formats(configs: dict[str, Any]) -> None:
    """Let transformers' table of ``configs`` choose ours, with which comes our quantizer, as said above. Idempotent."""
    for method in _OWNERS:
        stock = configs.get(method)
        if stock is not None and not hasattr(stock, "_chosen_by_gptq_backend"):
            configs[method] = _choosing(method, stock)


def _choosing(method: str, stock: Any) -> Any:
    """A class like ``stock`` that makes our config where we serve."""

    def from_dict(cls: Any, config_dict: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        chosen = GPTQConfig if _serves(method, config_dict) else stock
        return chosen.from_dict(config_dict, *args, **kwargs)

    members = {"from_dict": classmethod(from_dict), "_chosen_by_gptq_backend": True, "__doc__": stock.__doc__}
    return type(stock.__name__, (stock,), members)


def _serves(method: str, settings: dict[str, Any]) -> bool:
    if (missing := _missing(method)) is None:
        return False
    try:
        QuantizeConfig.from_dict(settings)
    except ConfigError as error:
        logger.warning("gptq_backend cannot load this checkpoint: %s", error)
        return False
    logger.info("gptq_backend loads this checkpoint of %s, since %s is not installed", method, missing)
    return True


def _missing(method: str) -> str | None:
    """The package that the stock way lacks; None if it can work."""
    if method != "awq" or not transformers.__version__.startswith("4."):
        needed = [_OWNERS[method]]
    else:  # AutoAWQ, which has kernels for accelerators, and one of another package for CPUs
        needed = ["awq"] if torch.accelerator.is_available() else ["awq", "intel_extension_for_pytorch"]
    return next((package for package in needed if is_missing(package)), None)
