"""Quantized embeddings of a checkpoint: where they go in the model, and the head that is the same weight."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from gptq_backend import QuantEmbedding, StoredSpec, TiedHead
from gptq_backend.format import Manifest
from gptq_backend.model import replace_module

from ..quantized_layers import dtype_of_parameter, forget_tie, is_tied, make_dense, untie_head

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredEmbedding:
    """An embedding that is quantized in the checkpoint.

    Args:
        name, dense: of the module in the model.
        by_token: its layout, see :mod:`gptq_backend.embedding`.
        head: full name of the output embedding that is to multiply with it, or None.
    """

    name: str
    dense: nn.Embedding
    by_token: bool
    head: str | None

    @property
    def shape(self) -> tuple[int, int]:
        """(in_features, out_features) as it is stored."""
        size = self.dense.num_embeddings, self.dense.embedding_dim
        return size[::-1] if self.by_token else size

    def put(self, model: Any, spec: StoredSpec, backend: str | None) -> None:
        """Replace the dense module by an empty quantized one on meta, and the tied head."""
        dtype = dtype_of_parameter(model, f"{self.name}.weight", self.dense.weight.dtype)
        embedding = QuantEmbedding(spec, self.dense, self.name, backend, "meta", dtype, self.by_token)
        replace_module(model, self.name, embedding)
        if self.head is None:
            untie_head(model)  # it has a weight of its own, whatever the config says
            return
        replace_module(model, self.head, TiedHead(embedding, model.get_submodule(self.head).bias))
        forget_tie(model, self.head)


def keep_dense(model: Any) -> None:
    """Dequantize an embedding that is loaded and whose head cannot multiply with it, as no known tool writes it."""
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if isinstance(head, TiedHead) and not head.embedding.by_token:
        embedding = head.embedding
        logger.warning("%s is packed along its tokens and tied to the head; it is dequantized", embedding.name)
        make_dense(model, embedding.name, embedding, embedding.compute_dtype).requires_grad_(False)


def find_embeddings(model: Any, manifest: Manifest, quantized: Iterable[str]) -> list[StoredEmbedding]:
    """Those of the ``quantized`` layers that are embeddings in the model."""
    found, quantized = [], set(quantized)
    for name, module in model.named_modules():
        if name not in quantized or not isinstance(module, nn.Embedding):
            continue
        head, size = _tied_head(model, manifest, module), (module.num_embeddings, module.embedding_dim)
        # Of a square weight the columns do not tell; this project writes it by token if a head multiplies with it.
        by_token = head is not None if size[0] == size[1] else manifest[f"{name}.qweight"].shape[-1:] == size[:1]
        found.append(StoredEmbedding(name, module, by_token, head))
    return found


def _tied_head(model: Any, manifest: Manifest, embedding: nn.Embedding) -> str | None:
    """Full name of the output embedding that shares the weight of the input embedding; None if there is none, or the
    files have a weight for it.
    """
    head = model.get_output_embeddings() if hasattr(model, "get_output_embeddings") else None
    if not isinstance(head, nn.Linear) or embedding is not model.get_input_embeddings():
        return None
    name = next(each for each, module in model.named_modules() if module is head)
    stored = f"{name}.weight" in manifest or f"{name}.qweight" in manifest
    return name if is_tied(model, name) and not stored else None
