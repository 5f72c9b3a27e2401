"""GPTQModel's 5-, 6- and 7-bit layers, which lie in planes (``gptq_p``): their codes are held in 8 bits, exactly.

Each run of 32 codes is one 4-bit plane of four words, then a 2-bit plane of two words where there is one, then a 1-bit
plane of one word.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import QuantizeConfig
from ..errors import CheckpointError
from . import packing
from .layout import FLOATS, LayerShape, Parts, read_order, require, require_shapes, widened
from .weight import QuantizedWeight

LAYOUT = "gptq_p"
_PLANES = {5: ((4, 0), (1, 4)), 6: ((4, 0), (2, 4)), 7: ((4, 0), (2, 4), (1, 6))}  # width, lowest bit
_INTS, _RUN = (torch.int32,), 32


def matches(parts: Parts, config: QuantizeConfig) -> bool:
    return config.checkpoint_format == "gptq_p" and _bits(parts) in _PLANES


def _bits(parts: Parts) -> float:
    # GPTQModel always writes a g_idx
    if "g_idx" not in parts or not parts["g_idx"].numel or len(parts["qweight"].shape) != 2:
        return 0
    return parts["qweight"].shape[0] * 32 / parts["g_idx"].numel


def shape(name: str, parts: Parts, config: QuantizeConfig) -> LayerShape:
    require(name, LAYOUT, parts, {"qweight": _INTS, "qzeros": _INTS, "scales": FLOATS})
    bits, features = int(_bits(parts)), parts["g_idx"].numel
    groups, out_features = parts["scales"].shape
    words = {"qweight": (features * bits // 32, out_features), "qzeros": (groups, out_features * bits // 32)}
    require_shapes(name, LAYOUT, parts, words)
    if features % _RUN or out_features % _RUN:
        raise CheckpointError(
            f"{name} has {features} inputs and {out_features} outputs, expected multiples of {_RUN} in planes; export "
            "the checkpoint anew"
        )
    order = read_order(name, "g_idx", parts["g_idx"], features, groups)
    size = int(torch.bincount(order).max())
    act_order = not torch.equal(order, torch.arange(features, dtype=torch.int32) // size)
    return LayerShape(features, out_features, groups, size, bits, parts["scales"].dtype or torch.float16, act_order)


def read(name: str, tensors: Mapping[str, Tensor], shape: LayerShape) -> QuantizedWeight:
    codes = _unpack(tensors["qweight"], shape.stored_bits)
    zeros = _unpack(tensors["qzeros"].t().contiguous(), shape.stored_bits).t().contiguous()
    codes, zeros = widened(codes, zeros, shape)
    return QuantizedWeight(codes, tensors["scales"], zeros, tensors["g_idx"].int(), shape.bits)


def _unpack(words: Tensor, bits: int) -> Tensor:
    """words: int32 [n*b/32, m] -> uint8 [n, m]."""
    runs = words.reshape(-1, bits, words.shape[1])
    codes = torch.zeros((len(runs), _RUN, words.shape[1]), dtype=torch.uint8, device=words.device)
    first = 0
    for width, low in _PLANES[bits]:
        codes |= packing.unpack_stream(runs[:, first : first + width], width) << low
        first += width
    return codes.reshape(-1, words.shape[1])
