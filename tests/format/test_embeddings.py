"""The way back from quantized embeddings to 16 bits, from the files alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from gptq_backend import CheckpointError, QuantizeConfig, QuantizedWeight
from gptq_backend.format import dense_embeddings, encode, read_manifest
from tests.format.test_stored_tensors import random_weight

CONFIG = QuantizeConfig(bits=4, group_size=16)
NAME = "model.embed_tokens"


def written(folder: Path, weight: QuantizedWeight, head: bool = False) -> Path:
    tensors: dict[str, Tensor] = {f"{NAME}.{part}": tensor for part, tensor in encode(weight)[1].items()}
    layer = encode(random_weight(4, 32, 32, 16, sym=True))[1]
    tensors |= {f"model.layers.0.mlp.{part}": tensor for part, tensor in layer.items()}
    tensors |= {"lm_head.weight": torch.zeros(2, 2)} if head else {}
    save_file(tensors, folder / "model.safetensors")
    return folder / "model.safetensors"


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("vocabulary", [40, 32])
@pytest.mark.parametrize("by_token", [True, False])
def test_each_layout_comes_back_as_rows(bits: int, sym: bool, vocabulary: int, by_token: bool, tmp_path: Path) -> None:
    """Of a square weight (32) the shape does not tell; then a head in the file does."""
    shape = (32, vocabulary) if by_token else (vocabulary, 32)
    weight = random_weight(bits, *shape, 16, sym=sym)
    manifest = read_manifest([written(tmp_path, weight, head=not by_token)])
    config = QuantizeConfig(bits=4, group_size=16, dynamic={f"+:{NAME}$": {"bits": bits, "sym": sym}})
    ((name, dense),) = dense_embeddings(manifest, config, vocabulary, 32, torch.float32)
    assert name == f"{NAME}.weight"
    assert torch.equal(dense, weight.dequantize() if by_token else weight.dequantize().t())
    assert dense.is_contiguous()


def test_another_vocabulary_is_refused(tmp_path: Path) -> None:
    manifest = read_manifest([written(tmp_path, random_weight(4, 32, 40, 16))])
    with pytest.raises(CheckpointError, match=r"embed_tokens: the checkpoint has 32 inputs, 40 outputs"):
        list(dense_embeddings(manifest, CONFIG, 50, 32))
