"""Ways to store a layer, which layers can have them, and the bytes that they take."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from ..config import QuantizeConfig
from ..config_fields import FORMATS, HELD_BITS
from ..format.stored_tensors import StoredSpec
from ..model.structure import Target, dense_weight

_NAMES = {torch.int32: "I32", torch.float16: "F16", torch.float32: "F32"}  # of safetensors; their length counts
_GROUP_SIZES = (32, 64, 128)  # for which every reader has kernels


@dataclass(frozen=True, order=True)
class Storage:
    """How a layer is stored."""

    group_size: int  # input channels that share a scale
    bits: int  # of a code

    @property
    def settings(self) -> dict[str, Any]:
        """As a ``dynamic`` rule has them."""
        return {"bits": self.bits, "group_size": self.group_size}

    def __str__(self) -> str:
        return f"{self.bits} bits, groups of {self.group_size}"


STORAGES = tuple(Storage(size, bits) for size in _GROUP_SIZES for bits in HELD_BITS)


def fitting(storages: Sequence[Storage], target: Target) -> list[Storage]:
    """Those that the layer can have: its input channels are whole groups, and planes hold whole runs of 32."""
    outputs, inputs = dense_weight(target.module).shape
    planar = FORMATS[target.config.checkpoint_format].planar_bits
    return [
        each for each in storages if inputs % each.group_size == 0 and (each.bits not in planar or not outputs % 32)
    ]


class StoredTensor(NamedTuple):
    """One tensor of a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Of its values."""
        return math.prod(self.shape) * self.dtype.itemsize


def stored_tensors(name: str, shape: Sequence[int], storage: Storage, config: QuantizeConfig) -> list[StoredTensor]:
    """Of a quantized layer, its bias aside; shape: [N, K]."""
    outputs, inputs = shape
    offset, planar_bits = FORMATS[config.checkpoint_format]
    spec = StoredSpec(
        in_features=inputs,
        out_features=outputs,
        bits=storage.bits,
        group_size=storage.group_size,
        groups=1 if storage.group_size == -1 else math.ceil(inputs / storage.group_size),
        zero_offset=offset,
        planar=storage.bits in planar_bits,
        word_dtype=getattr(torch, config.pack_dtype),
    )
    return [StoredTensor(f"{name}.{key}", spec.dtypes[key], each) for key, each in spec.shapes.items()]


def stored_bytes(shape: Sequence[int], storage: Storage, config: QuantizeConfig) -> int:
    """Of a quantized layer in the file, its bias aside; shape: [N, K]."""
    return sum(each.nbytes for each in stored_tensors("", shape, storage, config))


def file_bytes(tensors: Sequence[StoredTensor]) -> int:
    """Of a safetensors file of them. Several files that share them take as much, but for some bytes."""
    entries, end = {}, 0
    for each in sorted(tensors, key=lambda each: (-each.dtype.itemsize, each.name)):  # as the library does
        kind = _NAMES.get(each.dtype, "BF16")
        entries[each.name] = {"dtype": kind, "shape": each.shape, "data_offsets": [end, end := end + each.nbytes]}
    header = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"))
    return 8 + -(-len(header) // 8) * 8 + end
