"""Make transformers load GPTQ checkpoints with gptq_backend, without a line of the user's code.

torch calls :func:`install` at the end of ``import torch`` (entry point group ``torch.backends``). It imports nothing;
it only waits for two modules of transformers and acts at the first look at each after it is complete:

- ``transformers.quantizers.auto``: gptq_transformers takes over, unless the stock path could work (optimum and
  gptqmodel are both installed) or gptq_transformers is imported already (then it does, or did, so itself);
- ``transformers.utils.quantization_config``: under the same condition, ``GPTQConfig`` keeps arguments that it does not
  know (``lm_head``, ``dynamic``) and takes ``modules_in_block_to_quantize`` without optimum.

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

__all__ = ["install"]


def install() -> None:
    """Entry point: wait for the modules in ``_HOOKS``. Idempotent; never raises."""
    try:
        if os.environ.get("GPTQ_BACKEND_AUTOLOAD", "1") != "0":
            watch(_HOOKS, _run_hook)
    except Exception as error:  # whatever it is, `import torch` must go on
        _complain(error)


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
        _complain(error)


def _complain(error: Exception) -> None:
    import logging

    logging.getLogger("gptq_backend").warning(
        "gptq_backend could not hook into transformers (%s: %s); `import gptq_transformers` shows the whole error, "
        "GPTQ_BACKEND_AUTOLOAD=0 turns this off",
        type(error).__name__,
        error,
    )
