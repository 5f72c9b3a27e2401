"""The layout ``pack-quantized`` of compressed-tensors, which llm-compressor writes: read and written.

| tensor | | shape |
|---|---|---|
| ``weight_packed`` | int32 | [N, ceil(K*b/32)], signed codes plus ``2**(b-1)``, packed along K |
| ``weight_scale`` | float | [N, G]; [N, 1] for one group per channel, [1] for one at all |
| ``weight_zero_point`` | int32 | [ceil(N*b/32), G], packed along N in the same way; older ones int8 [N, G]; absent: 0 |
| ``weight_shape`` | int64 | [2]: N and K |
| ``weight_g_idx`` | int32 | [K], the group of each input channel; absent or -1 without act-order |
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import QuantizeConfig
from ..errors import CheckpointError
from . import packing
from .headers import read_tensor
from .layout import FLOATS, LayerShape, Parts, group_size, require, require_shapes, widened
from .weight import QuantizedWeight

LAYOUT = "compressed-tensors"


def matches(parts: Parts, config: QuantizeConfig) -> bool:
    return "weight_scale" in parts


def shape(name: str, parts: Parts, config: QuantizeConfig) -> LayerShape:
    require(name, LAYOUT, parts, {"weight_packed": (torch.int32,)})
    if "weight_shape" not in parts or parts["weight_shape"].shape != (2,):
        raise CheckpointError(f"{name}: weight_shape is missing or no pair of numbers; export the checkpoint anew")
    out_features, features = (int(size) for size in read_tensor(parts["weight_shape"]))
    scales = parts["weight_scale"]
    if scales.dtype not in FLOATS or not scales.shape or scales.numel == 0 or len(scales.shape) > 2:
        raise CheckpointError(
            f"{name}.weight_scale is {scales.dtype} of shape {list(scales.shape)}, expected a float matrix; export the "
            "checkpoint anew"
        )
    groups = scales.shape[1] if len(scales.shape) == 2 else 1
    if scales.numel != groups * out_features and scales.numel != 1:
        raise CheckpointError(
            f"{name}.weight_scale has shape {list(scales.shape)}, expected {[out_features, groups]} for "
            f"{out_features} outputs; fetch the checkpoint again or export it anew"
        )
    bits = _bits(name, parts, features, config)
    require_shapes(name, LAYOUT, parts, {"weight_packed": (out_features, packing.words_for(features, bits))})
    zeros = parts.get("weight_zero_point")
    if zeros is not None:
        rows = packing.words_for(out_features, bits) if zeros.dtype == torch.int32 else out_features
        require(name, LAYOUT, parts, {"weight_zero_point": (torch.int32, torch.int8)})
        require_shapes(name, LAYOUT, parts, {"weight_zero_point": (rows, groups)})
    order = _order(name, parts, features)
    size = group_size(name, features, groups, config)
    act_order = order is not None and not torch.equal(order, torch.arange(features, dtype=torch.int32) // size)
    return LayerShape(
        features, out_features, groups, size, bits, scales.dtype, act_order, sym=True if zeros is None else None
    )


def _bits(name: str, parts: Parts, features: int, config: QuantizeConfig) -> int:
    words = parts["weight_packed"].shape[1]
    fitting = [bits for bits in range(1, 9) if packing.words_for(features, bits) == words]
    if config.bits in fitting:
        return config.bits
    if len(fitting) != 1:
        raise CheckpointError(
            f"{name}.weight_packed has {words} words for {features} inputs, expected codes of 1 to 8 bits without "
            "gaps; export the checkpoint anew"
        )
    return fitting[0]


def _order(name: str, parts: Parts, features: int) -> Tensor | None:
    """int32 [K]: the stored g_idx, unless it says nothing."""
    if (info := parts.get("weight_g_idx")) is None or not info.numel:
        return None
    order = read_tensor(info).int()
    if order.shape != (features,):
        raise CheckpointError(
            f"{name}.weight_g_idx has shape {list(order.shape)}, expected {[features]}; fetch the checkpoint again"
        )
    return None if bool((order == -1).all()) else order


def read(name: str, tensors: Mapping[str, Tensor], shape: LayerShape) -> QuantizedWeight:
    bits, middle = shape.stored_bits, 1 << (shape.stored_bits - 1)
    codes = packing.unpack(tensors["weight_packed"].t().contiguous(), bits, shape.in_features)
    size = (shape.out_features, shape.groups)
    scales = tensors["weight_scale"].reshape(-1, shape.groups).expand(size).t().contiguous()
    stored = tensors.get("weight_zero_point")
    if stored is None:
        zeros = torch.full(size, middle, dtype=torch.uint8, device=codes.device)
    elif stored.dtype == torch.int32:
        zeros = packing.unpack(stored, bits, shape.out_features)
    else:
        signed = stored.int() + middle
        if bool(((signed < 0) | (signed >> bits > 0)).any()):
            raise CheckpointError(f"{name}.weight_zero_point is out of range for {bits} bits; fetch the file again")
        zeros = signed.to(torch.uint8)
    trivial = torch.arange(shape.in_features, dtype=torch.int32, device=codes.device) // shape.group_size
    g_idx = tensors["weight_g_idx"].int() if shape.act_order else trivial
    codes, zeros = widened(codes, zeros.t().contiguous(), shape)
    return QuantizedWeight(codes, scales, zeros, g_idx, shape.bits)


def write(weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a layer."""
    features, out_features = weight.codes.shape
    groups, bits = len(weight.scales), weight.bits
    parts = {
        "weight_packed": packing.pack(weight.codes, bits).t().contiguous(),
        "weight_scale": weight.scales.t().contiguous(),
        "weight_shape": torch.tensor([out_features, features]),
    }
    if not bool((weight.zeros == 1 << (bits - 1)).all()):
        parts["weight_zero_point"] = packing.pack(weight.zeros.t().contiguous(), bits)
    size = int(torch.bincount(weight.g_idx.long(), minlength=groups).max())
    if not torch.equal(weight.g_idx.cpu(), torch.arange(features, dtype=torch.int32) // size):
        parts["weight_g_idx"] = weight.g_idx.to(torch.int32, copy=True)
    return parts
