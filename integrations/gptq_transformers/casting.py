"""Casting a quantized model: which of its tensors change dtype, and that transformers lets them."""

from __future__ import annotations

import functools
import re

import torch
from torch import nn


def allow_casting(model: nn.Module) -> None:
    """Let ``.half()``, ``.float()`` and ``.to(dtype)`` work; transformers refuses them for every quantized model.

    A QuantLinear keeps its stored dtypes and computes in that of its input, so casting the rest is well defined.
    """
    for name in ("half", "float", "to"):
        setattr(model, name, functools.partial(getattr(nn.Module, name), model))


def forbid_casting(model: nn.Module) -> None:
    """Undo :func:`allow_casting`."""
    for name in ("half", "float", "to"):
        if isinstance(getattr(model, name), functools.partial):
            delattr(model, name)


def cast_parameters(model: nn.Module, old: torch.dtype, new: torch.dtype) -> None:
    """Cast those of dtype ``old``; others, and buffers such as rotary frequencies, are what they are on purpose."""
    for key, parameter in model.named_parameters():
        if parameter.dtype == old:
            parameter.data = parameter.data.to(dtype_of_parameter(model, key, new))


def dtype_of_parameter(model: nn.Module, key: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that transformers gives the parameter called ``key`` of a model that is loaded in ``dtype``."""
    kept: list[str] = []
    if dtype in (torch.float16, torch.bfloat16):
        kept += getattr(model, "_keep_in_fp32_modules_strict", None) or []
    if dtype == torch.float16:
        kept += getattr(model, "_keep_in_fp32_modules", None) or []
    return torch.float32 if any(re.search(rf"(^|\.){module}($|\.)", key) for module in kept) else dtype
