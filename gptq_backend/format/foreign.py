"""Layers that other tools stored in layouts of their own, shown as the tensors that GPTQ would have stored.

:func:`as_gptq` replaces them in a manifest. Whoever reads that manifest, or its tensors, need not know that there are
other layouts: values are translated when they are read, a layer at a time, and exactly.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..config import HELD_BITS, QuantizeConfig
from ..errors import CheckpointError
from . import awq, compressed_tensors, marlin
from .headers import Manifest, TensorFile, TensorInfo, read_tensor
from .layout import LayerShape, Parts
from .packing import words_for
from .stored_tensors import encode
from .weight import QuantizedWeight


@dataclass(frozen=True)
class Layout:
    """How a tool stores a layer.

    Args:
        name: for people.
        parts: of the stored tensors; the first marks a quantized layer.
        matches: whether a layer with such tensors has this layout.
        shape: what of it can be known without its values. Raises CheckpointError where tensors do not fit together.
        read: the values -> the weight, exactly. Raises CheckpointError where values are damaged.
    """

    name: str
    parts: tuple[str, ...]
    matches: Callable[[Parts, QuantizeConfig], bool]
    shape: Callable[[str, Parts, QuantizeConfig], LayerShape]
    read: Callable[[str, Mapping[str, Tensor], LayerShape], QuantizedWeight]


_OF_GPTQ = ("qweight", "qzeros", "scales", "g_idx")
LAYOUTS = (
    Layout("AWQ (GEMM)", _OF_GPTQ[:3], awq.is_gemm, awq.shape_of_gemm, awq.read_gemm),
    Layout("AWQ (GEMV, fast)", _OF_GPTQ[:3], awq.is_gemv_fast, awq.shape_of_gemv_fast, awq.read_gemv_fast),
    Layout("AWQ (GEMV)", _OF_GPTQ[:3], awq.is_gemv, awq.shape_of_gemv, awq.read_gemv),
    Layout(
        "compressed-tensors",
        ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape", "weight_g_idx"),
        compressed_tensors.matches,
        compressed_tensors.shape,
        compressed_tensors.read,
    ),
    Layout("Marlin", ("B", "s", "workspace"), marlin.matches, marlin.shape, marlin.read),
)
# Every name that a part of a quantized layer may have in a file, and those by which one is known.
STORED_PARTS = tuple(dict.fromkeys([*_OF_GPTQ, *(part for layout in LAYOUTS for part in layout.parts)]))
MARKS = tuple(dict.fromkeys(["qweight", *(layout.parts[0] for layout in LAYOUTS)]))


@dataclass(frozen=True, eq=False)
class ForeignLayer(TensorFile):
    """Reads a layer in another layout as GPTQ's tensors.

    Args:
        path: a file that has one of its tensors.
        name: in the manifest.
        layout, shape: of the layer.
        parts: its tensors as stored, without the bias.
        checkpoint_format: what the checkpoint's settings say of zeros.
    """

    name: str
    layout: Layout
    shape: LayerShape
    parts: Parts
    checkpoint_format: str

    __eq__, __hash__ = object.__eq__, object.__hash__  # two may be of the same file

    def __reduce__(self) -> tuple[Any, ...]:
        return ForeignLayer, (self.path, self.name, self.layout, self.shape, self.parts, self.checkpoint_format)

    def tensor(self, key: str) -> Tensor:
        """qweight, qzeros, scales or g_idx; the other parts come at no cost if they are read next."""
        return _translated(self)[key]

    def translate(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """GPTQ's tensors of ``tensors``, which are the stored ones; a bias stays.

        Raises:
            CheckpointError: their values are damaged.
        """
        weight = self.layout.read(self.name, tensors, self.shape)
        _, found = encode(weight, self.checkpoint_format)
        return found if tensors.get("bias") is None else {**found, "bias": tensors["bias"]}

    @property
    def infos(self) -> Iterator[tuple[str, TensorInfo]]:
        """What :meth:`tensor` gives."""
        shape = self.shape
        sizes: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
            "qweight": (torch.int32, (words_for(shape.in_features, shape.bits), shape.out_features)),
            "qzeros": (torch.int32, (shape.groups, words_for(shape.out_features, shape.bits))),
            "scales": (shape.scales_dtype, (shape.groups, shape.out_features)),
            "g_idx": (torch.int32, (shape.in_features,)),
        }
        for part, (dtype, size) in sizes.items():
            yield part, TensorInfo(dtype, size, self, part)


@functools.lru_cache(maxsize=1)  # of one layer, all parts are read before those of the next
def _translated(layer: ForeignLayer) -> dict[str, Tensor]:
    return layer.translate({part: read_tensor(info) for part, info in layer.parts.items()})


def as_gptq(manifest: Manifest, config: QuantizeConfig) -> Manifest:
    """``manifest`` with GPTQ's tensors, which are made when they are read, in the place of those of other layouts.

    Args:
        config: the checkpoint's settings, where the tensors alone do not tell.

    Raises:
        CheckpointError: tensors of a layer do not fit together, with its name.
    """
    layers: dict[str, dict[str, TensorInfo]] = {}
    for name, info in manifest.items():
        layer, _, part = name.rpartition(".")
        if part in STORED_PARTS:
            layers.setdefault(layer, {})[part] = info
    foreign = {layer: _foreign(layer, parts, config) for layer, parts in layers.items()}
    for layer, parts in layers.items():
        if foreign[layer] is None and "qweight" not in parts:
            _check_left(layer, parts, manifest)
    out: Manifest = {}
    for name, info in manifest.items():
        layer, _, part = name.rpartition(".")
        if (found := foreign.get(layer)) is None:
            out[name] = info
        elif part == found.layout.parts[0]:
            out.update({f"{layer}.{key}": each for key, each in found.infos})
        elif part not in (*found.layout.parts, "g_idx"):  # the layer's own order would hide the one that is stored
            out[name] = info
    return out


def _check_left(name: str, parts: Collection[str], manifest: Manifest) -> None:
    """Raises CheckpointError where parts of a layer are in no layout known here: nobody else would miss them."""
    weight = manifest.get(f"{name}.weight")
    scaled = "weight_scale" in parts and weight is not None and (weight.dtype is None or weight.dtype.itemsize == 1)
    if {"weight_zero_point", "weight_g_idx", "weight_shape"} & {*parts} or scaled:
        stored = ", ".join((*parts, *(["weight"] if weight is not None else [])))
        raise CheckpointError(
            f"{name}: {stored} are stored without weight_packed, expected it in the layout of compressed-tensors; "
            "fetch the checkpoint again, or load it with vLLM, or transformers and the package compressed-tensors"
        )
    if {"s", "workspace"} <= {*parts}:
        raise CheckpointError(f"{name}: B is missing, expected it in the layout of Marlin; fetch the checkpoint again")


def _foreign(name: str, parts: Mapping[str, TensorInfo], config: QuantizeConfig) -> ForeignLayer | None:
    for layout in LAYOUTS:
        if layout.parts[0] in parts and layout.matches(parts, config):
            own = {part: parts[part] for part in layout.parts if part in parts}
            shape = layout.shape(name, own, config)
            if shape.bits not in HELD_BITS:
                raise CheckpointError(
                    f"{name}: {shape.bits}-bit codes in the layout of {layout.name} cannot be held, expected at most 8"
                )
            path = own[layout.parts[0]].file.path
            return ForeignLayer(path, name, layout, shape, own, config.checkpoint_format)
    return None


def settings_of(qweight: TensorInfo, config: QuantizeConfig) -> QuantizeConfig | None:
    """Of the layer that has such a ``qweight``, in GPTQ's words; None if GPTQ stored it."""
    if not isinstance(qweight.file, ForeignLayer):
        return None
    shape = qweight.file.shape
    return dataclasses.replace(
        config,
        bits=shape.bits,
        group_size=-1 if shape.groups == 1 else shape.group_size,
        sym=config.sym if shape.sym is None else shape.sym,
        desc_act=shape.act_order,
        act_group_aware=None,
        static_groups=False,
        dynamic=None,
    )
