"""The hub value: a quantized weight, packed (what kernels take) or not (what the algorithm makes).

Every reader of a checkpoint format ends in a :class:`PackedWeight`, and every kernel begins with one. It can be cut
along both axes and joined along the outputs, which is what tensor parallelism and fused layers need.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from ..config_fields import held_bits
from . import packing


@dataclass(frozen=True)
class WeightSpec:
    """What a kernel has to know of a weight beside its values.

    Args:
        in_features, out_features: K and N.
        bits: width of a code.
        group_size: channels per group, K for a single group; with act-order the size that the groups were made with.
        groups: G, rows of the scales.
        sym: every zero is ``2**(bits-1)``.
        act_order: the groups are scattered over the input channels, hence the weight has a ``g_idx``.
        scales_dtype: float16, bfloat16 or float32.
    """

    in_features: int
    out_features: int
    bits: int
    group_size: int
    groups: int
    sym: bool = True
    act_order: bool = False
    scales_dtype: torch.dtype = torch.float16

    @property
    def trivial_g_idx(self) -> Tensor:
        """int32 [K]: the group of each input channel without act-order."""
        return torch.arange(self.in_features, dtype=torch.int32) // self.group_size

    def describe(self) -> str:
        """For the ``repr`` of modules."""
        return (
            f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}, "
            f"sym={self.sym}, act_order={self.act_order}"
        )


@dataclass(frozen=True)
class QuantizedWeight:
    """``W[n, k] = (codes[k, n] - zeros[g_idx[k], n]) * scales[g_idx[k], n]``.

    Args:
        codes: uint8 [K, N], below ``2**bits``.
        scales: float [G, N], already rounded to the dtype that is stored.
        zeros: uint8 [G, N], below ``2**bits``.
        g_idx: int32 [K], group of each input channel.
        bits: width of a code.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    g_idx: Tensor
    bits: int

    def to(self, device: torch.device) -> QuantizedWeight:
        """The same on another device."""
        codes, scales, zeros = self.codes.to(device), self.scales.to(device), self.zeros.to(device)
        return QuantizedWeight(codes, scales, zeros, self.g_idx.to(device), self.bits)

    def rows(self, part: slice) -> QuantizedWeight:
        """Some of the output channels."""
        codes, scales, zeros = (field[:, part].contiguous() for field in (self.codes, self.scales, self.zeros))
        return QuantizedWeight(codes, scales, zeros, self.g_idx, self.bits)

    def held(self) -> QuantizedWeight:
        """The same weight with codes as wide as memory has them; what is symmetric stays so."""
        bits = held_bits(self.bits)
        more = widening(self.bits)
        return dataclasses.replace(self, codes=self.codes + more, zeros=self.zeros + more, bits=bits)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """[N, K] weight, computed in ``dtype``."""
        index = self.g_idx.long()
        difference = self.codes.to(dtype) - self.zeros.to(dtype)[index]
        return (difference * self.scales.to(dtype)[index]).t().contiguous()


def widening(bits: int) -> int:
    """What codes and zeros of ``bits`` gain in memory: the middle of the narrow range becomes that of the wide one."""
    return (1 << (held_bits(bits) - 1)) - (1 << (bits - 1))


@dataclass(frozen=True)
class PackedWeight:
    """The same weight with its codes packed, whatever format it came from.

    Args:
        spec: of the weight.
        qweight: int32 [>= ceil(K*bits/32), N], the codes of each output channel in one stream, lowest bits first. Bits
            behind the last code are kept: a layer has to give back the file that it was read from.
        zeros: uint8 [G, N].
        scales: float [G, N].
        g_idx: int32 [K], the group of each input channel; None without act-order.
        bias: float [N], or None.
    """

    spec: WeightSpec
    qweight: Tensor
    zeros: Tensor
    scales: Tensor
    g_idx: Tensor | None = None
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.spec.out_features

    @property
    def channels(self) -> int:
        """Input channels that ``qweight`` has bits of: K, and what fills its last words."""
        return -(-self.qweight.shape[0] * 32 // self.spec.bits)

    def codes(self) -> Tensor:
        """uint8 [K, N]."""
        return packing.unpack(self.qweight, self.spec.bits, self.spec.in_features)

    def unpack(self) -> QuantizedWeight:
        """The same, not packed."""
        g_idx = self.spec.trivial_g_idx.to(self.qweight.device) if self.g_idx is None else self.g_idx
        return QuantizedWeight(self.codes(), self.scales, self.zeros, g_idx, self.spec.bits)

    def to(self, device: torch.device) -> PackedWeight:
        """Contiguous copies on ``device`` that share no memory with a mapped file."""
        tensors = {key: value for key, value in vars(self).items() if isinstance(value, Tensor)}
        moved: Any = {key: value.contiguous().to(device, copy=True) for key, value in tensors.items()}
        return dataclasses.replace(self, **moved)

    def outputs(self, rows: Tensor) -> PackedWeight:
        """The output channels ``rows``: int64 [n]."""
        bias = None if self.bias is None else selected(self.bias, 0, rows)
        spec = dataclasses.replace(self.spec, out_features=len(rows))
        qweight, zeros, scales = (selected(tensor, 1, rows) for tensor in (self.qweight, self.zeros, self.scales))
        return PackedWeight(spec, qweight, zeros, scales, self.g_idx, bias)

    def inputs(self, first: int, count: int) -> PackedWeight:
        """The input channels ``first`` to ``first + count``, and of their groups those that occur.

        The bias stays with the first input channel: those who share a sum add their results.
        """
        spec, last = self.spec, first + count
        if count == spec.in_features:
            return self
        if first * spec.bits % 32 == 0 and (last * spec.bits % 32 == 0 or last == spec.in_features):
            qweight = self.qweight[first * spec.bits // 32 :][: packing.words_for(count, spec.bits)]
        else:  # a cut within a word
            qweight = packing.pack(self.codes()[first:last], spec.bits)
        g_idx = spec.trivial_g_idx if self.g_idx is None else self.g_idx
        used, local = torch.unique(g_idx[first:last], return_inverse=True)
        used = used.long()
        # A single group has no order, whatever it was cut from.
        aligned = len(used) == 1 or (self.g_idx is None and first % spec.group_size == 0)
        spec = dataclasses.replace(
            spec,
            in_features=count,
            groups=len(used),
            group_size=count if len(used) == 1 else min(spec.group_size, count),
            act_order=not aligned,
        )
        return PackedWeight(
            spec,
            qweight,
            self.zeros[used],
            self.scales[used],
            None if aligned else local.to(torch.int32),
            self.bias if first == 0 else None,
        )

    def padded(self, out_features: int) -> PackedWeight:
        """With output channels that are always zero behind the last one."""
        more = (0, out_features - self.spec.out_features)
        if more == (0, 0):
            return self
        middle = 1 << (self.spec.bits - 1)  # keeps a symmetric weight symmetric
        return PackedWeight(
            dataclasses.replace(self.spec, out_features=out_features),
            pad(self.qweight, more),
            pad(self.zeros, more, value=middle),
            pad(self.scales, more),
            self.g_idx,
            None if self.bias is None else pad(self.bias, more),
        )

    def joins(self, right: PackedWeight) -> bool:
        """Whether one product can serve both: they differ in their values and in N, no more."""
        specs = [dataclasses.replace(weight.spec, out_features=0) for weight in (self, right)]
        if specs[0] != specs[1] or (self.bias is None) != (right.bias is None):
            return False
        return self.g_idx is None or right.g_idx is None or torch.equal(self.g_idx, right.g_idx)


def side_by_side(weights: Sequence[PackedWeight]) -> PackedWeight:
    """One weight with the outputs of all; each must join the first (:meth:`PackedWeight.joins`)."""
    if len(weights) == 1:
        return weights[0]
    first, biases = weights[0], [weight.bias for weight in weights if weight.bias is not None]
    return PackedWeight(
        dataclasses.replace(first.spec, out_features=sum(weight.out_features for weight in weights)),
        torch.cat([weight.qweight for weight in weights], 1),
        torch.cat([weight.zeros for weight in weights], 1),
        torch.cat([weight.scales for weight in weights], 1),
        first.g_idx,
        torch.cat(biases) if biases else None,
    )


def selected(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """``index_select``, without a copy where the index is a range. index: int64 [n], n > 0."""
    first, count = int(index[0]), len(index)
    if torch.equal(index, torch.arange(first, first + count)):
        return tensor.narrow(dim, first, count)
    return tensor.index_select(dim, index)
