"""Quantized input embeddings of a vLLM model, and output embeddings that are the same weight."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from gptq_backend import PackedWeight

from .compat import QuantizeMethodBase, VocabParallelEmbedding
from .linear import GPTQLinearMethod
from .pieces import AnyPiece, DensePiece
from .stored_layers import ExpectedLayer, StoredLayers


class GPTQEmbeddingMethod(GPTQLinearMethod):
    """An input embedding that is quantized in the file. One that is packed along the tokens is dequantized.

    Args:
        name: vLLM's.
        by_token: its layout, see :mod:`gptq_backend.embedding`.
    """

    def __init__(self, stored: StoredLayers, name: str, by_token: bool) -> None:
        super().__init__(stored, [name])
        self._by_token = by_token

    def embedding(self, layer: Any, input_: Tensor) -> Tensor:
        """input_: int64 [...] -> [..., H] in the model's dtype."""
        rows: Tensor = layer.segments.look_up(input_, self._dtype)
        return rows

    def _expected(self, layer: Any, index: int, input_size: int, has_bias: bool) -> ExpectedLayer:
        sizes = layer.embedding_dim, layer.org_vocab_size
        return ExpectedLayer(*(sizes if self._by_token else sizes[::-1]))

    def _place(self, name: str, weight: AnyPiece) -> None:
        if not self._by_token and isinstance(weight, PackedWeight):
            weight = DensePiece(weight.unpack().dequantize().t().to(self._dtype))
        super()._place(name, weight)


class TiedHeadMethod(QuantizeMethodBase):
    """An output embedding that has no weight in the file: the quantized input embedding takes its place."""

    def create_weights(self, layer: Any, *args: Any, **kwargs: Any) -> None:
        pass

    def tie_weights(self, layer: Any, embed_tokens: Any) -> Any:
        return embed_tokens

    def apply(self, layer: Any, *args: Any, **kwargs: Any) -> Tensor:
        raise RuntimeError("the model has not tied its output embedding, though the checkpoint has no weight for it")


def embedding_method(stored: StoredLayers, layer: VocabParallelEmbedding, prefix: str) -> GPTQEmbeddingMethod | None:
    """For an input embedding; None if it is dense."""
    name = stored.embedding(prefix)
    if name is None or not stored.checkpoint.is_quantized(name):
        return None
    return GPTQEmbeddingMethod(stored, name, stored.embedding_by_token(name, layer.org_vocab_size, layer.embedding_dim))


def tied_method(stored: StoredLayers, layer: VocabParallelEmbedding, prefix: str) -> TiedHeadMethod | None:
    """For an output embedding of which the file has nothing, if the input embedding is quantized and serves as one."""
    name = stored.embedding("")
    if stored.checkpoint.stored_name(prefix) is not None or name is None or not stored.checkpoint.is_quantized(name):
        return None
    by_token = stored.embedding_by_token(name, layer.org_vocab_size, layer.embedding_dim)
    return TiedHeadMethod() if by_token else None
