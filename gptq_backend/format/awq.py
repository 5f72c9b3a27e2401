"""AWQ's three layouts of a 4-bit layer, as AutoAWQ writes them: GEMM, GEMV and fast GEMV; and GEMM written.

All have unsigned codes and zeros, in contiguous groups: ``W[n, k] = (code - zero) * scale``.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from ..config import QuantizeConfig
from ..errors import CheckpointError, ConfigError
from ..foreign_settings import AWQ_VERSION
from . import packing
from .layout import FLOATS, LayerShape, Parts, group_size, require, require_shapes
from .weight import QuantizedWeight

BITS = 4
_PER_WORD = 8
# The nibble of a word, from the lowest, in which each of its eight output channels lies: the kernel takes apart two at
# a time, so channels 0, 2, 4, 6 come before 1, 3, 5, 7.
_NIBBLE = (0, 4, 1, 5, 2, 6, 3, 7)
_CHANNEL = (0, 2, 4, 6, 1, 3, 5, 7)  # and the channel of each nibble
_ROWS, _RUN = 4, 64  # fast GEMV: four output channels share a word; runs of 64 input channels

_INTS = (torch.int32,)


# -- GEMM: qweight int32 [K, N/8], qzeros int32 [G, N/8], scales [G, N] -----------------------------------------------


def is_gemm(parts: Parts, config: QuantizeConfig) -> bool:
    words, scales = parts["qweight"].shape, parts["scales"].shape if "scales" in parts else ()
    return len(words) == len(scales) == 2 and words[1] * _PER_WORD == scales[1] and not is_gemv(parts, config)


def shape_of_gemm(name: str, parts: Parts, config: QuantizeConfig) -> LayerShape:
    require(name, "AWQ (GEMM)", parts, {"qweight": _INTS, "qzeros": _INTS, "scales": FLOATS})
    features, words = parts["qweight"].shape
    groups = parts["scales"].shape[0]
    require_shapes(name, "AWQ (GEMM)", parts, {"qzeros": (groups, words), "scales": (groups, words * _PER_WORD)})
    return _shape(features, words * _PER_WORD, groups, group_size(name, features, groups), parts)


def read_gemm(name: str, tensors: Mapping[str, Tensor], shape: LayerShape) -> QuantizedWeight:
    codes, zeros = _in_order(tensors["qweight"]), _in_order(tensors["qzeros"])
    return _weight(codes, tensors["scales"], zeros, shape)


def _in_order(words: Tensor) -> Tensor:
    """words: int32 [R, N/8] -> uint8 [R, N]."""
    rows, columns = words.shape
    nibbles = packing.unpack(words.t(), BITS, columns * _PER_WORD).t()
    return nibbles.reshape(rows, columns, _PER_WORD)[..., list(_NIBBLE)].reshape(rows, -1)


def _out_of_order(codes: Tensor) -> Tensor:
    """Undo :func:`_in_order`."""
    rows, columns = codes.shape
    nibbles = codes.reshape(rows, columns // _PER_WORD, _PER_WORD)[..., list(_CHANNEL)].reshape(rows, columns)
    return packing.pack(nibbles.t().contiguous(), BITS).t().contiguous()


def write_gemm(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    """The tensors of a layer.

    Raises:
        ConfigError: AWQ cannot hold it, with the reason.
    """
    (features, out_features), groups = weight.codes.shape, len(weight.scales)
    size = features // groups
    contiguous = torch.equal(weight.g_idx.cpu(), torch.arange(features, dtype=torch.int32) // max(size, 1))
    lacks = {
        f"{weight.bits} bits": weight.bits != BITS,
        "act-order, or groups of several sizes": not contiguous,
        f"{out_features} outputs, which 8 does not divide": out_features % _PER_WORD != 0,
    }
    scales = weight.scales.to(torch.float16)
    lacks["scales that float16 cannot hold"] = not bool(scales.isfinite().all())
    if reasons := [reason for reason, wrong in lacks.items() if wrong]:
        raise ConfigError(
            f"{name} has {reasons[0]}, expected what AWQ can hold (4 bits, groups of contiguous inputs, outputs in "
            "eights); convert to gptq or compressed-tensors instead"
        )
    return {
        "qweight": _out_of_order(weight.codes),
        "qzeros": _out_of_order(weight.zeros),
        "scales": scales,
    }


# -- GEMV: qweight int32 [N, K/8], qzeros int32 [N, W], scales [N, 8W]: W words have room for the groups ---------------


def is_gemv(parts: Parts, config: QuantizeConfig) -> bool:
    if config.extra.get(AWQ_VERSION) != "gemv" or not {"qzeros", "scales"} <= parts.keys():
        return False  # small ones cannot be told from GPTQ's by their shapes
    words, zeros, scales = (parts[part].shape for part in ("qweight", "qzeros", "scales"))
    return len(words) == len(zeros) == len(scales) == 2 and words[0] == zeros[0] == scales[0]


def shape_of_gemv(name: str, parts: Parts, config: QuantizeConfig) -> LayerShape:
    require(name, "AWQ (GEMV)", parts, {"qweight": _INTS, "qzeros": _INTS, "scales": FLOATS})
    out_features, words = parts["qweight"].shape
    features = words * _PER_WORD
    width = parts["qzeros"].shape[1]
    require_shapes(name, "AWQ (GEMV)", parts, {"scales": (out_features, width * _PER_WORD)})
    return _padded_shape(name, features, out_features, width * _PER_WORD, parts, config)


def read_gemv(name: str, tensors: Mapping[str, Tensor], shape: LayerShape) -> QuantizedWeight:
    codes = packing.unpack(tensors["qweight"].t().contiguous(), BITS, shape.in_features)
    zeros = packing.unpack(tensors["qzeros"].t().contiguous(), BITS, shape.groups)
    scales = tensors["scales"].t()
    _check_room(name, scales, shape)
    return _weight(codes, scales[: shape.groups], zeros, shape)


# -- fast GEMV: qweight int16 [N/4, K], qzeros and scales float16 [8W, N] ----------------------------------------------


def is_gemv_fast(parts: Parts, config: QuantizeConfig) -> bool:
    return parts["qweight"].dtype == torch.int16 and "qzeros" in parts and parts["qzeros"].dtype in FLOATS


def shape_of_gemv_fast(name: str, parts: Parts, config: QuantizeConfig) -> LayerShape:
    layout = "AWQ (GEMV, fast)"
    require(name, layout, parts, {"qweight": (torch.int16,), "qzeros": FLOATS, "scales": FLOATS})
    rows, features = parts["qweight"].shape
    room = parts["scales"].shape[0]
    require_shapes(name, layout, parts, dict.fromkeys(("qzeros", "scales"), (room, rows * _ROWS)))
    if features % _RUN:
        raise CheckpointError(
            f"{name}.qweight has {features} inputs, expected a multiple of {_RUN} in the layout of {layout}; export "
            "the checkpoint anew"
        )
    return _padded_shape(name, features, rows * _ROWS, room, parts, config)


def read_gemv_fast(name: str, tensors: Mapping[str, Tensor], shape: LayerShape) -> QuantizedWeight:
    """The zeros are stored as ``-zero * scale``, rounded; those that an integer did not make are refused."""
    features, out_features = shape.in_features, shape.out_features
    words = tensors["qweight"].int() & 0xFFFF
    nibbles = torch.stack([(words >> shift) & 15 for shift in (0, 4, 8, 12)], -1)  # [N/4, K, 4]
    # A run of 64 channels of four rows lies as 4 x 64 codes, four of them to a word.
    runs = nibbles.view(out_features // _ROWS, features // _RUN, _ROWS, _RUN)
    rows = runs.transpose(1, 2).reshape(out_features, features // 32, 4, 2, 4)
    pairs = rows.transpose(3, 4)  # eight codes lie as 0 2 4 6 1 3 5 7
    codes = pairs.transpose(2, 3).reshape(out_features, features)  # and 32 of them as 0 1 8 9 16 17 24 25 2 3 ...
    _check_room(name, tensors["scales"], shape)
    scales, stored = tensors["scales"][: shape.groups], tensors["qzeros"][: shape.groups].float()
    zeros = (-stored / scales.float()).nan_to_num().round()
    again = -(scales.float() * zeros).to(tensors["qzeros"].dtype).float()
    if not torch.equal(again, stored) or bool(((zeros < 0) | (zeros > 15)).any()):
        raise CheckpointError(
            f"{name}.qzeros holds zeros that are no integers from 0 to 15, expected those of AutoAWQ; the file is "
            "damaged, or another tool's: export it with version='gemm'"
        )
    return _weight(codes.t().to(torch.uint8), scales, zeros.to(torch.uint8), shape)


def _padded_shape(
    name: str, features: int, out_features: int, room: int, parts: Parts, config: QuantizeConfig
) -> LayerShape:
    """Where scales have room for more groups than there are: only the settings tell how many."""
    size = features if config.group_size == -1 else config.group_size
    groups = features // size
    if features % size or not groups <= room:
        raise CheckpointError(
            f"{name} has room for {room} groups, expected it for {features} inputs in groups of {size}; correct "
            "group_size in the config or export the checkpoint anew"
        )
    return _shape(features, out_features, groups, size, parts)


def _check_room(name: str, scales: Tensor, shape: LayerShape) -> None:
    """Raises CheckpointError where the scales [room, N] show that the settings tell another number of groups."""
    used = (scales != 0).any(1).nonzero()
    if len(used) != shape.groups or int(used.max()) >= shape.groups:
        raise CheckpointError(
            f"{name}.scales has {len(used)} groups for {shape.in_features} inputs, expected {shape.groups} of "
            f"{shape.group_size}; correct group_size in the config or fetch the checkpoint again"
        )


def _shape(features: int, out_features: int, groups: int, size: int, parts: Parts) -> LayerShape:
    return LayerShape(features, out_features, groups, size, BITS, parts["scales"].dtype or torch.float16)


def _weight(codes: Tensor, scales: Tensor, zeros: Tensor, shape: LayerShape) -> QuantizedWeight:
    g_idx = torch.arange(shape.in_features, dtype=torch.int32, device=codes.device) // shape.group_size
    return QuantizedWeight(codes.contiguous(), scales.contiguous(), zeros.contiguous(), g_idx, BITS)
