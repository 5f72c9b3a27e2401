"""Keeping accelerate's hooks, which move a module's inputs to its device, when modules are replaced."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.hooks import add_hook_to_module
from torch import nn

from gptq_backend.module_moves import offloading_hook


@contextmanager
def keeping_hooks(model: nn.Module) -> Iterator[None]:
    """A module that takes the place of one with a hook gets that hook.

    Hooks that load offloaded weights are not for others: their weights are those of the module that is gone.
    """
    hooks = {
        name: module._hf_hook
        for name, module in model.named_modules()
        if hasattr(module, "_hf_hook") and offloading_hook(module) is None
    }
    yield
    modules = dict(model.named_modules())
    for name, hook in hooks.items():
        module = modules.get(name)
        if module is not None and not hasattr(module, "_hf_hook"):
            add_hook_to_module(module, hook)
