"""Which dtype a parameter has in a model that is loaded in, or cast to, another one."""

from __future__ import annotations

import re

import torch
from torch import nn


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
