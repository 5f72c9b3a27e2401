"""Embeddings of tokens that are quantized in a checkpoint: which layers they are, and the way back to 16 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..config import QuantizeConfig
from .headers import Manifest, read_tensor
from .layer_specs import quantized_modules, resolve_specs
from .stored_tensors import read_packed

# What models call the input embedding. Where a model is at hand, it tells.
EMBEDDINGS = frozenset([
    "embed_in", "embed_tokens", "embedding", "embeddings", "shared", "tok_embeddings", "tokens_embed",
    "word_embeddings", "wte",
])  # fmt: skip


def dense_embeddings(
    manifest: Manifest, config: QuantizeConfig, vocabulary: int, width: int, dtype: torch.dtype = torch.bfloat16
) -> Iterator[tuple[str, Tensor]]:
    """``(name.weight, [vocabulary, width])`` of each quantized embedding, dequantized and rounded once to ``dtype``.

    They take the place of ``name.qweight`` and what belongs to it. A head that was tied is then tied to a dense weight:
    in ``config.json`` only the rule for ``name`` in ``dynamic`` and ``embed_bits`` go.

    Args:
        manifest: by the names in the file.
        vocabulary, width: of the embedding, as ``config.json`` has them; they and the shapes tell its layout.

    Raises:
        CheckpointError: an embedding is damaged, or of another size.
    """
    own_head = any(f"lm_head.{part}" in manifest for part in ("weight", "qweight"))
    for name in quantized_modules(manifest):
        if name.rpartition(".")[2] not in EMBEDDINGS:
            continue
        by_token = manifest[f"{name}.qweight"].shape[-1] == vocabulary and not (own_head and vocabulary == width)
        spec = resolve_specs(manifest, config, {name: (width, vocabulary) if by_token else (vocabulary, width)})[name]
        tensors = {part: read_tensor(manifest[f"{name}.{part}"]) for part in spec.shapes}
        weight = read_packed(spec, tensors, name).unpack().dequantize()
        yield f"{name}.weight", (weight if by_token else weight.t()).to(dtype).contiguous()
