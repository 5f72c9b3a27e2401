"""Methods that transformers refuses, or that fail, once a model is quantized: casting, resizing the vocabulary."""

from __future__ import annotations

import functools
import logging
from typing import Any

from torch import nn

from gptq_backend import QuantLinear
from gptq_backend.model import replace_module

from .dispatch import keeping_hooks

logger = logging.getLogger(__name__)

_CASTS = ("half", "float", "to")


def allow_changes(model: nn.Module) -> None:
    """Let ``.half()``, ``.float()``, ``.to(dtype)`` and ``resize_token_embeddings`` work.

    A QuantLinear keeps its stored dtypes and computes in that of its input, so casting the rest is well defined;
    transformers refuses it. It would resize the input embedding and then fail at a quantized output embedding.
    """
    for name in _CASTS:
        method = getattr(nn.Module, name)
        # With a name, which accelerate looks at in a model that is spread over devices.
        setattr(model, name, functools.update_wrapper(functools.partial(method, model), method))
    if hasattr(model, "resize_token_embeddings"):
        setattr(model, "resize_token_embeddings", functools.partial(_resize, model))  # noqa: B010


def forbid_changes(model: nn.Module) -> None:
    """Undo :func:`allow_changes`."""
    for name in (*_CASTS, "resize_token_embeddings"):
        vars(model).pop(name, None)


def _resize(
    model: Any, new_num_tokens: int | None = None, pad_to_multiple_of: int | None = None, *more: Any, **options: Any
) -> Any:
    """As the model's class does it, after a quantized output embedding of another size was dequantized."""
    head = model.get_output_embeddings()
    if isinstance(head, QuantLinear):
        rows = model.get_input_embeddings().weight.shape[0] if new_num_tokens is None else new_num_tokens
        multiple = pad_to_multiple_of or 1
        if -(-rows // multiple) * multiple != head.out_features:
            _dequantize_head(model, head)
    return type(model).resize_token_embeddings(model, new_num_tokens, pad_to_multiple_of, *more, **options)


def _dequantize_head(model: Any, head: QuantLinear) -> None:
    name = next(name for name, module in model.named_modules() if module is head)
    dense = head.dequantize(head.compute_dtype)
    logger.warning(
        "%s is quantized, and new tokens need rows in full precision: it was dequantized to resize it (%d MB instead "
        "of %d), and will be saved that way",
        name,
        dense.weight.nbytes >> 20,
        head.stored_spec.nbytes >> 20,
    )
    dense.requires_grad_(False)
    with keeping_hooks(model):
        replace_module(model, name, dense)
    settings: Any = getattr(model.config, "quantization_config", None)
    if getattr(settings, "lm_head", None):
        settings.lm_head = False
