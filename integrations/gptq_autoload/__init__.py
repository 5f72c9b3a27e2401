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

import functools
import importlib
import importlib.util
import os
import sys
from types import ModuleType
from typing import Any

__all__ = ["install", "relax_config"]


def install() -> None:
    """Entry point: wait for the modules in ``_HOOKS``. Idempotent; never raises."""
    try:
        if os.environ.get("GPTQ_BACKEND_AUTOLOAD", "1") == "0":
            return
        waiting = False
        for name in _HOOKS:
            module = sys.modules.get(name)
            if module is None:
                waiting = True
            elif _initializing(module):
                module.__class__ = _Watched
            else:
                _run_hook(module)
        if waiting and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
            sys.meta_path.insert(0, _Finder())
    except Exception as error:  # whatever it is, `import torch` must go on
        _complain(error)


def relax_config(config_class: Any) -> None:
    """Let ``config_class`` keep arguments that it does not know, and take module lists without optimum. Idempotent.

    transformers' ``GPTQConfig`` drops ``lm_head`` or ``dynamic`` silently, and asks for the version of optimum as soon
    as ``modules_in_block_to_quantize`` is given.
    """
    original = config_class.__init__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def __init__(self: Any, *args: Any, **kwargs: Any) -> None:
        passed = dict(kwargs)
        if _missing("optimum"):
            passed.pop("modules_in_block_to_quantize", None)
        original(self, *args, **passed)
        for key, value in kwargs.items():
            if key not in passed or not hasattr(self, key):
                setattr(self, key, value)

    config_class.__init__ = __init__


def _take_over(module: ModuleType) -> None:
    if "gptq_transformers" not in sys.modules and _stock_path_is_broken():
        importlib.import_module("gptq_transformers").register()


def _patch_config(module: ModuleType) -> None:
    if _stock_path_is_broken():
        relax_config(module.GPTQConfig)


def _stock_path_is_broken() -> bool:
    return _missing("optimum") or _missing("gptqmodel")


_HOOKS = {
    "transformers.quantizers.auto": _take_over,
    "transformers.utils.quantization_config": _patch_config,
}


class _Watched(ModuleType):
    """Class of a module of ``_HOOKS`` until it is complete and someone looks at it."""

    def __getattribute__(self, name: str) -> Any:
        get = super().__getattribute__
        if name != "__spec__" and not _initializing(self):
            self.__class__ = ModuleType  # type: ignore[assignment]
            _run_hook(self)
        return get(name)


class _Finder:
    """Marks the modules of ``_HOOKS`` as watched when they are imported; finds nothing by itself."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        if name not in _HOOKS:
            return None
        for finder in sys.meta_path:
            find = getattr(finder, "find_spec", None)
            spec = find(name, path, target) if find and finder is not self else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None


class _Loader:
    """Executes a module with its own loader, watched."""

    def __init__(self, loader: Any) -> None:
        self.loader = loader

    def create_module(self, spec: Any) -> Any:
        return self.loader.create_module(spec)

    def exec_module(self, module: Any) -> None:
        module.__spec__.loader = module.__loader__ = self.loader
        if type(module) is ModuleType:
            module.__class__ = _Watched
        self.loader.exec_module(module)


def _run_hook(module: ModuleType) -> None:
    try:
        _HOOKS[module.__name__](module)
    except Exception as error:  # a broken adapter must not break transformers for those who load no GPTQ model
        _complain(error)


def _initializing(module: ModuleType) -> bool:
    return bool(getattr(module.__spec__, "_initializing", False))


def _missing(name: str) -> bool:
    if name in sys.modules:
        return sys.modules[name] is None
    return importlib.util.find_spec(name) is None


def _complain(error: Exception) -> None:
    import logging

    logging.getLogger("gptq_backend").warning(
        "gptq_backend could not hook into transformers (%s: %s); `import gptq_transformers` shows the whole error, "
        "GPTQ_BACKEND_AUTOLOAD=0 turns this off",
        type(error).__name__,
        error,
    )
