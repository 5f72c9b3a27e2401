"""Make transformers load GPTQ checkpoints with gptq_backend, and peft train on them, without a line of the user's code.

torch calls :func:`install` at the end of ``import torch`` (entry point group ``torch.backends``). It imports nothing;
it only waits for three modules and acts at the first look at each after it is complete:

- ``transformers.quantizers.auto``: gptq_transformers takes over, unless the stock path could work (optimum and
  gptqmodel are both installed) or gptq_transformers is imported already (then it does, or did, so itself);
- ``transformers.utils.quantization_config``: under the same condition, ``GPTQConfig`` keeps arguments that it does not
  know (``lm_head``, ``dynamic``) and takes ``modules_in_block_to_quantize`` without optimum;
- ``peft``: gptq_peft lets its adapters lie on our quantized layers.

Off: ``GPTQ_BACKEND_AUTOLOAD=0``, or torch's own ``TORCH_DEVICE_BACKEND_AUTOLOAD=0``. An exception here would break
``import torch``, so none leaves. Standard library only, and a package of its own: an entry point inside a larger one
would run that one's ``__init__`` in a half-built torch.
"""

from __future__ import annotations

import importlib
import os
import sys
from types import ModuleType

from .stock_config import is_missing, relax_config
from .watch import watch

__all__ = ["install", "watch_peft"]


def install() -> None:
    """Entry point: wait for the modules in ``_HOOKS`` and for peft. Idempotent; never raises."""
    if os.environ.get("GPTQ_BACKEND_AUTOLOAD", "1") == "0":
        return
    try:
        watch(_HOOKS, _run_hook)
    except Exception as error:  # whatever it is, `import torch` must go on
        _complain("transformers", error)
    watch_peft()


def watch_peft() -> None:
    """Let peft's adapters lie on our quantized layers, as soon as it is imported. Idempotent; never raises."""
    try:
        watch(["peft"], _adapt_peft)
    except Exception as error:
        _complain("peft", error)


def _take_over(module: ModuleType) -> None:
    if "gptq_transformers" not in sys.modules:
        importlib.import_module("gptq_transformers").register()


def _patch_config(module: ModuleType) -> None:
    relax_config(module.GPTQConfig)


_HOOKS = {"transformers.quantizers.auto": _take_over, "transformers.utils.quantization_config": _patch_config}


def _run_hook(module: ModuleType) -> None:
    try:
        if is_missing("optimum") or is_missing("gptqmodel"):  # else the stock path works
            _HOOKS[module.__name__](module)
    except Exception as error:  # a broken adapter must not break transformers for those who load no GPTQ model
        _complain("transformers", error)


def _adapt_peft(module: ModuleType) -> None:
    try:
        importlib.import_module("gptq_peft").register()
    except Exception as error:  # a peft that is made in another way must go on
        _complain("peft", error)


def _complain(framework: str, error: Exception) -> None:
    import logging

    logging.getLogger("gptq_backend").warning(
        "gptq_backend could not hook into %s (%s: %s); `import gptq_%s` shows the whole error, "
        "GPTQ_BACKEND_AUTOLOAD=0 turns this off",
        framework,
        type(error).__name__,
        error,
        framework,
    )
