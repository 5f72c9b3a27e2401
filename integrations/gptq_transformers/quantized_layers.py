"""Which layers of a model are quantized, and of its parameters: which are one under two names, and in which dtype."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from typing import Any

import torch
from torch import nn

from gptq_backend import QuantLinear, TiedHead
from gptq_backend.model import replace_module


def quant_linears(model: nn.Module) -> Iterator[tuple[str, QuantLinear]]:
    """The model's quantized layers by name."""
    for name, module in model.named_modules():
        if isinstance(module, QuantLinear):
            yield name, module


def untie_quantized(model: Any) -> None:
    """Stop transformers from tying the embedding to an output layer that is quantized."""
    getter = getattr(model, "get_output_embeddings", None)
    head = getter() if getter else None
    if isinstance(head, TiedHead):
        forget_tie(model, next(name for name, module in model.named_modules() if module is head))
    if isinstance(head, QuantLinear):
        untie_head(model)


def untie_head(model: Any) -> None:
    """Stop transformers from tying the output embedding, which has a weight of its own."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    name = next((name for name, module in model.named_modules() if module is head), None)
    if name is None:
        return
    # T5 and its kin compute otherwise without the key: there a tied head is only left out below.
    encoder_decoder = getattr(model.config, "is_encoder_decoder", False)
    configs = () if encoder_decoder else (model.config, model.config.get_text_config(decoder=True))
    for config in configs:
        config.tie_word_embeddings = False
    tied = getattr(model, "all_tied_weights_keys", None)  # transformers 5
    if tied is not None:
        model.all_tied_weights_keys = {k: v for k, v in tied.items() if not k.startswith(f"{name}.")}


def is_tied(model: Any, head: str) -> bool:
    """Whether transformers ties the output embedding called ``head`` to the input embedding."""
    tied = getattr(model, "all_tied_weights_keys", None)  # transformers 5
    if tied is not None:
        return f"{head}.weight" in tied
    return bool(model.config.get_text_config(decoder=True).tie_word_embeddings)


def forget_tie(model: Any, head: str) -> None:
    """Stop transformers from tying the output embedding called ``head``, which shares its weight in its own way. The
    model's config still says that they are one.
    """
    key, known = f"{head}.weight", getattr(model, "_tied_weights_keys", None)
    if known:  # a dictionary in version 5, a list in version 4
        kept = (
            {k: v for k, v in known.items() if k != key} if isinstance(known, dict) else [k for k in known if k != key]
        )
        model._tied_weights_keys = kept
    tied = getattr(model, "all_tied_weights_keys", None)
    if tied is not None:
        model.all_tied_weights_keys = {k: v for k, v in tied.items() if k != key}


def make_dense(model: Any, name: str, layer: QuantLinear, dtype: torch.dtype) -> Any:
    """Replace a quantized layer by an ordinary one in ``dtype``, and a head that multiplied with it -> that layer."""
    dense = layer.dequantize(dtype)
    replace_module(model, name, dense)
    for key, head in list(model.named_modules()):
        if isinstance(head, TiedHead) and head.embedding is layer:
            replace_module(model, key, head.dequantize(dense.weight))
            vars(model).pop("_tied_weights_keys", None)  # that of forget_tie()
            if hasattr(model, "get_expanded_tied_weights_keys"):  # transformers 5
                model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True)
    return dense


def tied_names(model: Any) -> Collection[str]:
    """Parameters that are another one under a second name."""
    tied: Collection[str] | None = getattr(model, "all_tied_weights_keys", None)  # transformers 5
    if tied is None:
        tied = getattr(model, "_tied_weights_keys", None) or ()
        tied = tied if model.config.get_text_config(decoder=True).tie_word_embeddings else ()
    return tied


def dtype_of_parameter(model: nn.Module, key: str, dtype: torch.dtype) -> torch.dtype:
    """The dtype that transformers gives the parameter called ``key`` of a model that is loaded in ``dtype``."""
    kept: list[str] = []
    if dtype in (torch.float16, torch.bfloat16):
        kept += getattr(model, "_keep_in_fp32_modules_strict", None) or []
    if dtype == torch.float16:
        kept += getattr(model, "_keep_in_fp32_modules", None) or []
    return torch.float32 if any(re.search(rf"(^|\.){module}($|\.)", key) for module in kept) else dtype
