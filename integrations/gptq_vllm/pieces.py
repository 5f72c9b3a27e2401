"""A stored layer's weight cut into what one tensor-parallel rank needs, and neighbours joined again.

Works on packed words wherever a cut falls on a word boundary, and through the codes where it does not.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from gptq_backend import LinearSpec
from gptq_backend.format import packing, resolve, unpack_codes, unpack_zeros


@dataclass(frozen=True)
class Piece:
    """Some inputs and outputs of one stored quantized layer.

    Args:
        spec: of this piece, with ``zero_offset`` 0, int32 words and codes in one stream.
        qweight: int32 [ceil(k*bits/32), n].
        zeros: uint8 [G, n].
        scales: float [G, n] in the checkpoint's dtype.
        g_idx: int32 [k], or None without act-order.
        bias: [n], or None; one that the model does not know of.
    """

    spec: LinearSpec
    qweight: Tensor
    zeros: Tensor
    scales: Tensor
    g_idx: Tensor | None = None
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.spec.out_features

    @classmethod
    def from_stored(cls, spec: LinearSpec, tensors: Mapping[str, Tensor], name: str) -> Piece:
        """The whole layer.

        Raises:
            CheckpointError: damaged values, with the layer's ``name``.
        """
        spec = resolve(spec, tensors, name)
        zeros = unpack_zeros(spec, tensors["qzeros"])
        qweight = packing.to_int32_words(tensors["qweight"], 0)
        if spec.planar:
            qweight = packing.pack(unpack_codes(spec, tensors["qweight"]), spec.bits)
        spec = dataclasses.replace(
            spec,
            zero_offset=0,
            planar=False,
            word_dtype=torch.int32,
            has_g_idx=spec.act_order,
            empty_g_idx=False,
            g_idx_dtype=torch.int32,
            has_bias=False,
            bias_dtype=torch.float16,
        )
        g_idx = tensors["g_idx"].to(torch.int32) if spec.act_order else None
        return cls(spec, qweight, zeros, tensors["scales"], g_idx, tensors.get("bias"))

    def to(self, device: torch.device) -> Piece:
        """Contiguous copies on ``device`` that share no memory with a mapped file."""
        tensors = {key: value for key, value in vars(self).items() if isinstance(value, Tensor)}
        moved: dict[str, Any] = {key: value.contiguous().to(device, copy=True) for key, value in tensors.items()}
        return dataclasses.replace(self, **moved)

    def outputs(self, rows: Tensor) -> Piece:
        """The output channels ``rows``: int64 [n]."""
        bias = None if self.bias is None else _taken(self.bias, 0, rows)
        spec = dataclasses.replace(self.spec, out_features=len(rows))
        qweight, zeros, scales = (_taken(tensor, 1, rows) for tensor in (self.qweight, self.zeros, self.scales))
        return Piece(spec, qweight, zeros, scales, self.g_idx, bias)

    def padded(self, out_features: int) -> Piece:
        """With output channels that are always zero behind the last one."""
        more = (0, out_features - self.spec.out_features)
        if more == (0, 0):
            return self
        middle = 1 << (self.spec.bits - 1)  # keeps a symmetric piece symmetric
        return Piece(
            dataclasses.replace(self.spec, out_features=out_features),
            pad(self.qweight, more),
            pad(self.zeros, more, value=middle),
            pad(self.scales, more),
            self.g_idx,
            None if self.bias is None else pad(self.bias, more),
        )

    def inputs(self, first: int, count: int) -> Piece:
        """The input channels ``first`` to ``first + count``, and of their groups those that occur.

        The bias belongs to the piece that has the first input: ranks add their results.
        """
        spec, last = self.spec, first + count
        if count == spec.in_features:
            return self
        if first * spec.bits % 32 == 0 and (last * spec.bits % 32 == 0 or last == spec.in_features):
            qweight = self.qweight[first * spec.bits // 32 :][: packing.words_for(count, spec.bits)]
        else:
            qweight = packing.pack(unpack_codes(spec, self.qweight)[first:last], spec.bits)
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
            has_g_idx=not aligned,
            act_order=not aligned,
        )
        return Piece(
            spec,
            qweight,
            self.zeros[used],
            self.scales[used],
            None if aligned else local.to(torch.int32),
            self.bias if first == 0 else None,
        )

    def stored(self) -> tuple[LinearSpec, dict[str, Tensor]]:
        """Spec and tensors as a kernel's ``prepare`` takes them; bias excluded."""
        qzeros = packing.pack(self.zeros.t(), self.spec.bits).t().contiguous()
        tensors = {"qweight": self.qweight.contiguous(), "qzeros": qzeros, "scales": self.scales.contiguous()}
        if self.g_idx is not None:
            tensors["g_idx"] = self.g_idx
        return self.spec, tensors


@dataclass(frozen=True)
class DensePiece:
    """Some inputs and outputs of one stored layer in 16 bits. weight: float [n, k]."""

    weight: Tensor

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    def to(self, device: torch.device) -> DensePiece:
        return DensePiece(self.weight.contiguous().to(device, copy=True))

    def outputs(self, rows: Tensor) -> DensePiece:
        """See :meth:`Piece.outputs`."""
        return DensePiece(_taken(self.weight, 0, rows))

    def padded(self, out_features: int) -> DensePiece:
        """See :meth:`Piece.padded`."""
        return DensePiece(pad(self.weight, (0, 0, 0, out_features - self.weight.shape[0])))

    def inputs(self, first: int, count: int) -> DensePiece:
        """See :meth:`Piece.inputs`."""
        return DensePiece(self.weight[:, first : first + count])


AnyPiece = Piece | DensePiece


def joined(pieces: Sequence[AnyPiece]) -> list[AnyPiece]:
    """Neighbours that one kernel call can serve, side by side in one piece: same spec but for N, same groups."""
    found: list[AnyPiece] = []
    for piece in pieces:
        left = found[-1] if found else None
        if isinstance(left, DensePiece) and isinstance(piece, DensePiece):
            found[-1] = DensePiece(torch.cat([left.weight, piece.weight]))
        elif isinstance(left, Piece) and isinstance(piece, Piece) and _compatible(left, piece):
            found[-1] = _side_by_side(left, piece)
        else:
            found.append(piece)
    return found


def _side_by_side(left: Piece, right: Piece) -> Piece:
    return Piece(
        dataclasses.replace(left.spec, out_features=left.spec.out_features + right.spec.out_features),
        torch.cat([left.qweight, right.qweight], dim=1),
        torch.cat([left.zeros, right.zeros], dim=1),
        torch.cat([left.scales, right.scales], dim=1),
        left.g_idx,
        None if left.bias is None or right.bias is None else torch.cat([left.bias, right.bias]),
    )


def _compatible(left: Piece, right: Piece) -> bool:
    specs = [dataclasses.replace(piece.spec, out_features=0) for piece in (left, right)]
    if specs[0] != specs[1] or (left.bias is None) != (right.bias is None):
        return False
    return left.g_idx is None or right.g_idx is None or torch.equal(left.g_idx, right.g_idx)


def _taken(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """``index_select``, without a copy where the index is a range."""
    first, count = int(index[0]), len(index)
    if torch.equal(index, torch.arange(first, first + count)):
        return tensor.narrow(dim, first, count)
    return tensor.index_select(dim, index)
