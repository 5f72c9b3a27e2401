"""A layer's tensors as a checkpoint stores them, and the way from there to the hub value and back."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..config_fields import FORMATS, PLANAR_ONLY_BITS, held_bits
from ..errors import CheckpointError, ConfigError
from . import packing
from .weight import PackedWeight, QuantizedWeight, WeightSpec, widening

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredSpec(WeightSpec):
    """A weight and how a file stores it: everything about the layer's tensors except their values.

    ``sym`` and ``act_order`` are what the checkpoint claims, until :func:`resolve` has compared them with the values.
    ``bits`` is the width in the file; in memory, a weight may be wider (:attr:`weight`).

    Args:
        zero_offset: what to add to a stored zero: 1 for ``gptq``, 0 for ``gptq_v2`` and ``gptq_p``.
        planar: codes and zeros lie in planes (``gptq_p``).
        has_g_idx, has_bias: whether the tensor exists in the checkpoint.
        empty_g_idx: it exists without elements, which means the same as absent.
        word_dtype, bias_dtype, g_idx_dtype: dtypes in the checkpoint.
    """

    zero_offset: int = 1
    planar: bool = False
    has_g_idx: bool = True
    empty_g_idx: bool = False
    has_bias: bool = False
    word_dtype: torch.dtype = torch.int32
    bias_dtype: torch.dtype = torch.float16
    g_idx_dtype: torch.dtype = torch.int32

    @property
    def weight(self) -> WeightSpec:
        """The part that kernels know: of the weight in memory."""
        known = {item.name: getattr(self, item.name) for item in dataclasses.fields(WeightSpec)}
        return WeightSpec(**known | {"bits": held_bits(self.bits)})

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each stored tensor."""
        word_bits = self.word_dtype.itemsize * 8
        shapes: dict[str, tuple[int, ...]] = {
            "qweight": (-(-self.in_features * self.bits // word_bits), self.out_features),
            "qzeros": (self.groups, -(-self.out_features * self.bits // word_bits)),
            "scales": (self.groups, self.out_features),
        }
        if self.has_g_idx or self.empty_g_idx:
            shapes["g_idx"] = (self.in_features,) if self.has_g_idx else (0,)
        if self.has_bias:
            shapes["bias"] = (self.out_features,)
        return shapes

    @property
    def dtypes(self) -> dict[str, torch.dtype]:
        """Dtype of each stored tensor."""
        all_dtypes = {
            "qweight": self.word_dtype,
            "qzeros": self.word_dtype,
            "scales": self.scales_dtype,
            "g_idx": self.g_idx_dtype,
            "bias": self.bias_dtype,
        }
        return {name: all_dtypes[name] for name in self.shapes}

    @property
    def nbytes(self) -> int:
        """Size of the stored tensors in bytes."""
        dtypes = self.dtypes
        return sum(torch.Size(shape).numel() * dtypes[name].itemsize for name, shape in self.shapes.items())


def encode(
    weight: QuantizedWeight, checkpoint_format: str = "gptq", word_dtype: torch.dtype = torch.int32
) -> tuple[StoredSpec, dict[str, Tensor]]:
    """The tensors of a checkpoint. Returns their spec and qweight, qzeros, scales, g_idx (shapes in docs/format.md).

    Raises:
        ConfigError: no such format, or it cannot hold the weight.
    """
    if checkpoint_format not in FORMATS:
        raise ConfigError(f"checkpoint_format={checkpoint_format!r} is not supported; choose one of {tuple(FORMATS)}")
    features, out_features = weight.codes.shape
    bits, groups = weight.bits, weight.scales.shape[0]
    if bits not in FORMATS[checkpoint_format].bits:
        raise ConfigError(
            f"checkpoint_format={checkpoint_format!r} cannot hold {bits}-bit codes, expected one of "
            f"{FORMATS[checkpoint_format].bits}; use 'gptq_p'"
        )
    offset, planar_bits = FORMATS[checkpoint_format]
    planar = bits in planar_bits
    stored_zeros = (weight.zeros.int() - offset) & ((1 << bits) - 1)
    spec = StoredSpec(
        in_features=features,
        out_features=out_features,
        bits=bits,
        group_size=int(torch.bincount(weight.g_idx.long()).max()),  # of the largest: what the groups were made with
        groups=groups,
        zero_offset=offset,
        planar=planar,
        sym=bool((weight.zeros == 1 << (bits - 1)).all()),
        scales_dtype=weight.scales.dtype,
        word_dtype=word_dtype,
    )
    spec = dataclasses.replace(spec, act_order=not torch.equal(weight.g_idx.cpu(), spec.trivial_g_idx))
    qweight = packing.pack(weight.codes, bits, planar)
    qzeros = packing.pack(stored_zeros.t(), bits, planar).t()
    return spec, {
        "qweight": packing.from_int32_words(qweight, word_dtype, 0, spec.shapes["qweight"][0]).contiguous(),
        "qzeros": packing.from_int32_words(qzeros, word_dtype, 1, spec.shapes["qzeros"][1]).contiguous(),
        "scales": weight.scales.contiguous(),
        "g_idx": weight.g_idx.to(torch.int32, copy=True),  # layers that share an input share the order: no aliases
    }


def check_planes(name: str, shape: Sequence[int], bits: int, checkpoint_format: str, instead: str) -> None:
    """Raises ConfigError where planes cannot hold a weight of that shape, before a long run finds out.

    instead: what to do then, for the message.
    """
    if bits in FORMATS[checkpoint_format].planar_bits and any(size % 32 for size in shape):
        raise ConfigError(
            f"{name} is {[*shape]}, but checkpoint_format={checkpoint_format!r} packs {bits}-bit codes in runs of 32; "
            f"{instead}"
        )


def decode(tensors: Mapping[str, Tensor], bits: int, checkpoint_format: str = "gptq") -> QuantizedWeight:
    """The way back from :func:`encode`, whose tensors ``tensors`` are."""
    scales, g_idx = tensors["scales"], tensors["g_idx"]
    offset, planar_bits = FORMATS[checkpoint_format]
    spec = StoredSpec(
        in_features=len(g_idx),
        out_features=scales.shape[1],
        bits=bits,
        group_size=len(g_idx),
        groups=len(scales),
        zero_offset=offset,
        planar=bits in planar_bits,
    )
    codes, zeros = unpack_codes(spec, tensors["qweight"]), unpack_zeros(spec, tensors["qzeros"])
    return QuantizedWeight(codes, scales, zeros.contiguous(), g_idx, bits)


def read_packed(spec: StoredSpec, tensors: Mapping[str, Tensor], name: str) -> PackedWeight:
    """The weight of stored tensors, checked.

    Raises:
        ConfigError, CheckpointError: see :func:`resolve`.
    """
    spec = resolve(spec, tensors, name)
    qweight, weight = packing.to_int32_words(tensors["qweight"], 0), spec.weight
    more = widening(spec.bits)
    if spec.planar:
        runs = -(-qweight.shape[0] // spec.bits)  # of 32 channels; a file may end within the last one
        qweight = packing.pack(packing.unpack(qweight, spec.bits, runs * 32, planar=True) + more, weight.bits)
    g_idx = tensors["g_idx"].to(torch.int32) if spec.act_order else None
    if spec.sym:  # resolve() has looked at all of them
        zeros = torch.full(spec.shapes["scales"], 1 << (weight.bits - 1), dtype=torch.uint8, device=qweight.device)
    else:
        zeros = unpack_zeros(spec, tensors["qzeros"]) + more
    return PackedWeight(weight, qweight, zeros, tensors["scales"], g_idx, tensors.get("bias"))


def read_quantized(spec: StoredSpec, tensors: Mapping[str, Tensor], name: str) -> QuantizedWeight:
    """The same, not packed, and as wide as in the file: what can be stored again."""
    weight, more = read_packed(spec, tensors, name).unpack(), widening(spec.bits)
    return dataclasses.replace(weight, codes=weight.codes - more, zeros=weight.zeros - more, bits=spec.bits)


def stored_words(spec: StoredSpec, qweight: Tensor) -> Tensor:
    """``qweight`` of a :class:`PackedWeight` as the file had it, bit for bit."""
    rows = spec.shapes["qweight"][0]
    if spec.planar:
        held = held_bits(spec.bits)
        codes = packing.unpack(qweight, held, qweight.shape[0] // held * 32) - widening(spec.bits)
        qweight = packing.pack(codes, spec.bits, planar=True)
    return packing.from_int32_words(qweight, spec.word_dtype, 0, rows)[:rows]


def unpack_codes(spec: StoredSpec, qweight: Tensor) -> Tensor:
    """uint8 [K, N] from ``qweight``."""
    return packing.unpack(packing.to_int32_words(qweight, 0), spec.bits, spec.in_features, spec.planar)


def unpack_zeros(spec: StoredSpec, qzeros: Tensor) -> Tensor:
    """uint8 [G, N] from ``qzeros``. The offset is added to each field, never to a packed word, and wraps."""
    words = packing.to_int32_words(qzeros, 1).t()
    stored = packing.unpack(words, spec.bits, spec.out_features, spec.planar).t()
    return (stored + spec.zero_offset) & ((1 << spec.bits) - 1)


def empty_tensors(spec: StoredSpec, device: torch.device | str | None) -> dict[str, Tensor]:
    """The tensors of a checkpoint, bias included, uninitialised."""
    dtypes = spec.dtypes
    return {key: torch.empty(shape, dtype=dtypes[key], device=device) for key, shape in spec.shapes.items()}


def resolve(spec: StoredSpec, tensors: Mapping[str, Tensor], name: str) -> StoredSpec:
    """Complete ``spec`` with what only the values tell: whether ``g_idx`` is real, and what the zeros mean.

    A checkpoint that claims ``sym`` and stores zeros that are all ``2**(b-1)`` or all ``2**(b-1) - 1`` means
    ``2**(b-1)``, whatever its format key says (v2 zeros under a v1 label are in circulation).

    Raises:
        ConfigError: the spec has codes of 5 to 7 bits outside of planes, where no format has them.
        CheckpointError: packed words of another dtype, ``g_idx`` out of range, or non-finite scales or bias (which need
            not be among ``tensors``), with the module's ``name``.
    """
    if spec.bits in PLANAR_ONLY_BITS and not spec.planar:
        raise ConfigError(
            f"{name}: its spec has {spec.bits}-bit codes one after another, expected them in planes, as "
            "checkpoint_format='gptq_p' has them; pass planar=True"
        )
    for key in {"qweight", "qzeros"} & tensors.keys():  # load_state_dict(assign=True) compares no dtypes
        if tensors[key].dtype != spec.word_dtype:
            raise CheckpointError(
                f"{name}.{key}: the packed words are {tensors[key].dtype}, expected {spec.word_dtype}; a cast moves "
                "them apart: load them as they were stored"
            )
    largest = (1 << spec.bits) - 1  # code minus zero
    for key, factor in (("scales", largest), ("bias", 1)):
        if key in tensors and not (worst := tensors[key].float() * factor).isfinite().all():
            bad = int((~worst.isfinite()).sum())
            raise CheckpointError(
                f"{name}.{key}: {bad} values are NaN or infinite, or would make weights infinite; the file is damaged, "
                "fetch it again"
            )
    spec = dataclasses.replace(spec, act_order=spec.has_g_idx and _has_act_order(spec, tensors["g_idx"], name))
    if spec.sym:
        stored = unpack_zeros(dataclasses.replace(spec, zero_offset=0), tensors["qzeros"])
        middle = 1 << (spec.bits - 1)
        first = int(stored[0, 0])
        if first in (middle, middle - 1) and bool((stored == first).all()):
            spec = dataclasses.replace(spec, zero_offset=middle - first)
        else:
            logger.warning("%s: config says sym, but the zeros vary; they are used as stored (asymmetric)", name)
            spec = dataclasses.replace(spec, sym=False)
    return spec


def check_groups(name: str, g_idx: Tensor, groups: int) -> None:
    """Raises CheckpointError where ``g_idx``, a tensor called ``name``, names groups that do not exist."""
    low, high = int(g_idx.min()), int(g_idx.max())
    if low < 0 or high >= groups:
        raise CheckpointError(
            f"{name}: values span {low}..{high}, expected 0..{groups - 1} ({groups} rows of scales); the file is "
            "damaged, fetch it again"
        )


def _has_act_order(spec: StoredSpec, g_idx: Tensor, name: str) -> bool:
    check_groups(f"{name}.g_idx", g_idx, spec.groups)
    if spec.groups > 1 and bool((g_idx == g_idx[0]).all()):  # a placeholder that nobody filled, not one group for all
        if spec.act_order:
            raise CheckpointError(
                f"{name}.g_idx is {int(g_idx[0])} for all {len(g_idx)} inputs, expected {spec.groups} groups, since "
                "desc_act is true; the order is lost: fetch the file again or export it anew"
            )
        logger.warning("%s.g_idx was never filled; the groups are taken as contiguous, as without act-order", name)
        return False
    return not torch.equal(g_idx.cpu().int(), spec.trivial_g_idx)
