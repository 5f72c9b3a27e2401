"""Quantized embeddings in peft: dense where an adapter changes them, and found where prompts are put before tokens."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from gptq_backend import QuantEmbedding, TiedHead

from .quantized import is_loaded


def free_embeddings(model: Any, configs: Mapping[str, Any]) -> None:
    """Dequantize the embedding that an adapter of ``configs`` is to lie on, and with it a head that is tied to it.

    peft reads and merges into rows of an ``nn.Embedding``; of a quantized one it says that the layer is unknown, in
    part only when it is called.
    """
    for name, module in list(model.named_modules()):
        if not isinstance(module, QuantEmbedding | TiedHead) or not is_loaded(model):
            continue
        if any(_changes(config, name) for config in configs.values()):
            from gptq_transformers.changes import dequantize_embedding

            layer = module.embedding if isinstance(module, TiedHead) else module
            dequantize_embedding(model, layer, "an adapter changes its rows")
            return


def _changes(config: Any, name: str) -> bool:
    """Whether peft puts something on the embedding, or tied head, that is called ``name``."""
    from peft.tuners.tuners_utils import check_target_module_exists

    if getattr(config, "trainable_token_indices", None) or getattr(config, "token_indices", None):
        return True
    return bool(getattr(config, "target_modules", None) and check_target_module_exists(config, name))


@contextmanager
def found_by_size(model: nn.Module) -> Iterator[None]:
    """Inside, quantized embeddings have a parameter ``weight`` of one row for each token, and of no columns.

    peft takes that module for the embedding whose first parameter has as many rows as the vocabulary has tokens.
    """
    embeddings = [module for module in model.modules() if isinstance(module, QuantEmbedding)]
    held = [module._parameters for module in embeddings]
    for module, parameters in zip(embeddings, held, strict=True):
        weight = nn.Parameter(torch.empty(module.num_embeddings, 0), requires_grad=False)
        module._parameters = {"weight": weight, **parameters}
    try:
        yield
    finally:
        for module, parameters in zip(embeddings, held, strict=True):
            module._parameters = parameters
