"""Ways to store a layer, which layers can have them, and the bytes that they take."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from ..config import QuantizeConfig
from ..config_fields import FORMATS, HELD_BITS
from ..format.stored_tensors import StoredSpec
from ..model.structure import Target, dense_weight

_GROUP_SIZES = (32, 64, 128)  # for which every reader has kernels


@dataclass(frozen=True, order=True)
class Storage:
    """How a layer is stored."""

    group_size: int  # input channels that share a scale
    bits: int  # of a code

    @property
    def settings(self) -> dict[str, int]:
        """As a ``dynamic`` rule has them."""
        return {"bits": self.bits, "group_size": self.group_size}

    def __str__(self) -> str:
        return f"{self.bits} bits, groups of {self.group_size}"


STORAGES = tuple(Storage(size, bits) for size in _GROUP_SIZES for bits in HELD_BITS)


def fitting(storages: Sequence[Storage], target: Target) -> list[Storage]:
    """Those that the layer can have: its input channels are whole groups, and planes hold whole runs of 32."""
    outputs, inputs = dense_weight(target.module).shape
    planar = FORMATS[target.config.checkpoint_format].planar_bits
    return [each for each in storages if inputs % each.group_size == 0 and (each.bits not in planar or not outputs % 32)]


class StoredTensor(NamedTuple):
    """One tensor of a file."""

    name: str
    dtype: str  # as safetensors calls it; only its length matters
    shape: tuple[int, ...]
    nbytes: int


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
    sizes = {key: spec.dtypes[key].itemsize for key in spec.shapes}
    return [
        StoredTensor(f"{name}.{key}", "I32", each, math.prod(each) * sizes[key]) for key, each in spec.shapes.items()
    ]


def stored_bytes(shape: Sequence[int], storage: Storage, config: QuantizeConfig) -> int:
    """Of a quantized layer in the file, its bias aside; shape: [N, K]."""
    return sum(each.nbytes for each in stored_tensors("", shape, storage, config))


def header_bytes(tensors: Iterable[StoredTensor]) -> int:
    """Of a safetensors file's header, which names all tensors."""
    entries, end = {}, 0
    for each in tensors:
        entries[each.name] = {"dtype": each.dtype, "shape": each.shape, "data_offsets": [end, end + each.nbytes]}
        end += each.nbytes
    text = json.dumps({"__metadata__": {"format": "pt"}, **entries}, separators=(",", ":"))
    return 8 + -(-len(text) // 8) * 8
