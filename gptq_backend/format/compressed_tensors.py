"""The layout ``pack-quantized`` of compressed-tensors, which llm-compressor writes: read and written.

| tensor | | shape |
|---|---|---|
| ``weight_packed`` | int32 | [N, ceil(K*b/32)], signed codes plus ``2**(b-1)``, packed along K |
| ``weight_scale`` | float | [N, G]; [N, 1] for one group per channel, [1] for one at all |
| ``weight_zero_point`` | int32 | [ceil(N*b/32), G], packed along N in the same way; older ones int8 [N, G]; absent: 0 |
| ``weight_shape`` | int64 | [2]: N and K |
| ``weight_g_idx`` | int32 | [K], the group of each input channel; absent or -1 without act-order |

Versions before 0.20 put ``32 // b`` codes into each word, which makes a difference for 3, 5, 6 and 7 bits: read too.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import QuantizeConfig
from ..errors import CheckpointError
from ..foreign_settings import WIDTHS
from . import packing
from .headers import read_tensor
from .layout import FLOATS, INDICES, LayerShape, Parts, group_size, read_order, require, require_shapes
from .weight import QuantizedWeight

LAYOUT = "compressed-tensors"


def matches(parts: Parts, config: QuantizeConfig) -> bool:
    return True


def shape(name: str, parts: Parts, config: QuantizeConfig) -> LayerShape:
    require(name, LAYOUT, parts, {"weight_packed": (torch.int32,)})
    for part in ("weight_shape", "weight_scale"):
        if part not in parts:
            raise CheckpointError(
                f"{name}: {part} is missing, expected it in the layout of {LAYOUT}; fetch the checkpoint again or "
                "export it anew"
            )
    if parts["weight_shape"].shape != (2,) or parts["weight_shape"].dtype not in INDICES:
        raise CheckpointError(f"{name}.weight_shape is no pair of integers; export the checkpoint anew")
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
    bits, gaps = _width(name, parts["weight_packed"].shape[1], features, config)
    require_shapes(name, LAYOUT, parts, {"weight_packed": (out_features, parts["weight_packed"].shape[1])})
    zeros = parts.get("weight_zero_point")
    if zeros is None and not config.sym:
        raise CheckpointError(
            f"{name}: weight_zero_point is missing, though the config says symmetric=false; fetch the checkpoint again"
        )
    if zeros is not None:
        rows = _words(out_features, bits, gaps) if zeros.dtype == torch.int32 else out_features
        require(name, LAYOUT, parts, {"weight_zero_point": (torch.int32, torch.int8)})
        require_shapes(name, LAYOUT, parts, {"weight_zero_point": (rows, groups)})
    order = _order(name, parts, features, groups, config)
    size = features if config.group_size == -1 else min(config.group_size, features)
    if -(-features // size) != groups:
        size = group_size(name, features, groups)
    act_order = order is not None and not torch.equal(order, torch.arange(features, dtype=torch.int32) // size)
    # Not what the config says: that is for all layers, and what a layer stores is certain.
    return LayerShape(features, out_features, groups, size, bits, scales.dtype, act_order, zeros is None, gaps)


def _width(name: str, words: int, features: int, config: QuantizeConfig) -> tuple[int, bool]:
    """Of codes that fill so many words per output: bits, and whether there are gaps between them.

    Versions before 0.20 put no code into two words, so 7-bit codes with gaps fill as many as 8-bit codes: only the
    settings tell them apart.
    """
    claimed = config.extra.get(WIDTHS, range(1, 9))
    # Without gaps where both would do.
    fitting = {bits: gaps for bits in claimed for gaps in (True, False) if _words(features, bits, gaps) == words}
    if len(fitting) == 1:
        return fitting.popitem()
    found = " or ".join(f"{bits}-bit codes" for bits in sorted(fitting)) or "codes of no whole width"
    raise CheckpointError(
        f"{name}.weight_packed has {words} words for {features} inputs, which make {found}, expected one width of 1 to "
        "8 bits that the config has as num_bits; correct it or export the checkpoint anew"
    )


def _words(count: int, bits: int, gaps: bool) -> int:
    return -(-count // (32 // bits)) if gaps else packing.words_for(count, bits)


def _unpack(words: Tensor, bits: int, count: int, gaps: bool) -> Tensor:
    """int32 [words, m] -> uint8 [count, m]."""
    if not gaps:
        return packing.unpack(words, bits, count)
    shifts = torch.arange(0, 32 - bits + 1, bits, dtype=torch.int32, device=words.device)[:, None]
    codes = words[:, None] >> shifts & ((1 << bits) - 1)
    return codes.to(torch.uint8).reshape(-1, words.shape[1])[:count]


def _order(name: str, parts: Parts, features: int, groups: int, config: QuantizeConfig) -> Tensor | None:
    """int32 [K]: the stored g_idx, unless it says nothing."""
    info = parts.get("weight_g_idx")
    filled = info is not None and info.numel and not bool((read_tensor(info) == -1).all())
    if info is not None and filled:
        return read_order(name, "weight_g_idx", info, features, groups)
    if config.desc_act and groups > 1:
        raise CheckpointError(
            f"{name}: weight_g_idx is missing or was never filled, though the config says actorder=group; the order is "
            "lost: fetch the checkpoint again or export it anew"
        )
    return None


def read(name: str, tensors: Mapping[str, Tensor], shape: LayerShape) -> QuantizedWeight:
    bits, middle = shape.stored_bits, 1 << (shape.stored_bits - 1)
    codes = _unpack(tensors["weight_packed"].t().contiguous(), bits, shape.in_features, shape.gaps)
    size = (shape.out_features, shape.groups)
    scales = tensors["weight_scale"].reshape(-1, shape.groups).expand(size).t().contiguous()
    stored = tensors.get("weight_zero_point")
    if stored is None:
        zeros = torch.full(size, middle, dtype=torch.uint8, device=codes.device)
    elif stored.dtype == torch.int32:
        zeros = _unpack(stored, bits, shape.out_features, shape.gaps)
    else:
        signed = stored.int() + middle
        if bool(((signed < 0) | (signed >> bits > 0)).any()):
            raise CheckpointError(f"{name}.weight_zero_point is out of range for {bits} bits; fetch the file again")
        zeros = signed.to(torch.uint8)
    trivial = torch.arange(shape.in_features, dtype=torch.int32, device=codes.device) // shape.group_size
    g_idx = tensors["weight_g_idx"].int() if shape.act_order else trivial
    return QuantizedWeight(codes, scales, zeros.t().contiguous(), g_idx, bits).held()


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
