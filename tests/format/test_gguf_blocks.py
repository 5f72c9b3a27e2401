"""GGUF's blocks, as the package gguf writes and reads them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gptq_backend import CheckpointError
from gptq_backend.format import EXACT_TYPES, read_blocks

gguf = pytest.importorskip("gguf")
SIZES = gguf.GGML_QUANT_SIZES
QUANTIZES = {"Q4_0", "Q5_0", "Q8_0"}  # of those read exactly, the types that the package can quantize to


def rows(kind: str, outputs: int, features: int) -> np.ndarray:
    """Blocks of random bytes with a finite scale, where the package cannot quantize to a type."""
    make = np.random.default_rng(0)
    type_ = gguf.GGMLQuantizationType[kind]
    if kind in QUANTIZES:
        return gguf.quants.quantize(make.standard_normal((outputs, features)).astype(np.float32), type_)
    elements, nbytes = SIZES[type_]
    data = make.integers(0, 256, (outputs * features // elements, nbytes)).astype(np.uint8)
    data[:, -2:] = make.standard_normal((len(data), 1)).astype(np.float16).view(np.uint8)
    return data.reshape(outputs, -1)


@pytest.mark.parametrize("kind", EXACT_TYPES)
def test_blocks_are_read_exactly(kind: str) -> None:
    data = rows(kind, 6, 512)
    expected = torch.from_numpy(gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind]))
    found = read_blocks("x", kind, torch.from_numpy(data.copy()), 512)
    assert found is not None
    assert torch.equal(found.dequantize(), expected)


def test_types_with_a_minimum_have_no_exact_counterpart() -> None:
    assert read_blocks("x", "Q4_1", torch.zeros(2, 20, dtype=torch.uint8), 32) is None
    assert read_blocks("x", "Q4_K", torch.zeros(2, 144, dtype=torch.uint8), 256) is None


def test_bytes_that_are_missing_are_noticed() -> None:
    with pytest.raises(CheckpointError, match="x: 17 bytes for 32 inputs of type Q4_0"):
        read_blocks("x", "Q4_0", torch.zeros(2, 17, dtype=torch.uint8), 32)
