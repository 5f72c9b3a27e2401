"""Random quantized layers that cost little to make: the packed words themselves are random."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from ..format import packing
from ..format.stored_tensors import StoredSpec, unpack_codes
from ..format.weight import QuantizedWeight

_MAX_UNPACKED = 1 << 24
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


@dataclass(frozen=True)
class Problem:
    """One layer to multiply by."""

    N: int  # output features
    K: int  # input features
    bits: int = 4  # width of a code
    group_size: int = 128  # input channels that share a scale, at most K
    sym: bool = True  # all zeros are 2**(bits-1), else random
    act_order: bool = False  # groups are scattered over the input channels
    dtype: str = "bf16"  # of the activations, a key of DTYPES

    @property
    def groups(self) -> int:
        return math.ceil(self.K / self.group_size)

    @property
    def nbytes(self) -> int:
        """What a product has to read: codes and 16-bit scales."""
        return self.N * self.K * self.bits // 8 + 2 * self.N * self.groups

    @property
    def spec(self) -> StoredSpec:
        return StoredSpec(
            in_features=self.K,
            out_features=self.N,
            bits=self.bits,
            group_size=self.group_size,
            groups=self.groups,
            zero_offset=0,
            sym=self.sym,
            has_g_idx=self.act_order,
            act_order=self.act_order,
        )


@dataclass(frozen=True)
class Weight:
    """The values of a :class:`Problem`."""

    problem: Problem
    tensors: dict[str, Tensor]  # as a checkpoint of format gptq_v2 holds them
    zeros: Tensor  # uint8 [G, N], which ``tensors`` also has, packed
    copies: int | None = None  # that take turns in a measurement; None for as many as no cache holds

    @classmethod
    def random(cls, problem: Problem, device: torch.device, copies: int | None = None) -> Weight:
        """Scales are exact in float16 and in bfloat16, and such that outputs are near 1 for inputs near 1."""
        shapes, bits = problem.spec.shapes, problem.bits
        qweight = torch.randint(-(2**31), 2**31, shapes["qweight"], dtype=torch.int32, device=device)
        if used := problem.K * bits % 32:
            qweight[-1] &= (1 << used) - 1  # the checkpoint's padding is zero
        scales = torch.rand(shapes["scales"], device=device).add_(0.5).mul_(4 / 2**bits / problem.K**0.5)
        if problem.sym:
            zeros = torch.full(shapes["scales"], 1 << (bits - 1), dtype=torch.uint8, device=device)
        else:
            zeros = torch.randint(0, 1 << bits, shapes["scales"], dtype=torch.uint8, device=device)
        tensors = {
            "qweight": qweight,
            "qzeros": packing.pack(zeros.t(), bits).t().contiguous(),
            "scales": scales.bfloat16().half(),
        }
        if problem.act_order:
            order = torch.randperm(problem.K, device=device)
            tensors["g_idx"] = (order // problem.group_size).int()
        return cls(problem, tensors, zeros, copies)

    def columns(self, index: Tensor | slice) -> QuantizedWeight:
        """The weight of some output channels."""
        qweight, scales = self.tensors["qweight"][:, index], self.tensors["scales"][:, index]
        codes = unpack_codes(self.problem.spec, qweight)
        g_idx = self.tensors.get("g_idx")
        if g_idx is None:
            g_idx = self.problem.spec.trivial_g_idx.to(codes.device)
        return QuantizedWeight(codes, scales, self.zeros[:, index], g_idx, self.problem.bits)

    def slices(self) -> Iterator[tuple[slice, QuantizedWeight]]:
        """All of it, in runs of output channels (multiples of 64) that are small when unpacked."""
        step = max(1, _MAX_UNPACKED // self.problem.K // 64) * 64
        for first in range(0, self.problem.N, step):
            index = slice(first, first + step)
            yield index, self.columns(index)
