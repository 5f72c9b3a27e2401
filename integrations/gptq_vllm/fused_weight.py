"""The prepared weight of one layer: segments side by side along the output, each with a kernel of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptq_backend import Kernel, select_kernel

from .pieces import AnyPiece, DensePiece, Piece, joined


class QuantizedSegment(nn.Module):
    """A quantized weight [K, N] in the layout of the kernel that serves it; its parameters are the kernel's.

    Args:
        piece: on the device to run on.
        backend: row of the kernel table, or None for the fastest that fits.
        expert: see ``select_kernel``.
    """

    def __init__(self, piece: Piece, backend: str | None, expert: bool = False) -> None:
        super().__init__()
        self.spec, tensors = piece.stored()
        self.out_features = self.spec.out_features
        self._backend = backend
        self._prepare(select_kernel(self.spec, piece.qweight.device, backend, expert), tensors)
        self.extra_bias = None if piece.bias is None else nn.Parameter(piece.bias, requires_grad=False)

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: float [..., K], bias: [N] or None -> [..., N] in the dtype of x."""
        if self.extra_bias is not None:
            bias = self.extra_bias if bias is None else bias + self.extra_bias
        # Outside of a trace the kernel is called without the detour through torch's dispatcher.
        call = self.kernel.op if torch.compiler.is_compiling() else self.kernel.apply
        return call(self.spec, self._parameters, x, bias)  # type: ignore[arg-type]

    def serve_alone(self) -> None:
        """Take back what being an expert had to do with the choice of the kernel."""
        kernel = select_kernel(self.spec, self.qweight.device, self._backend)  # type: ignore[arg-type]
        if kernel is not self.kernel:
            held: Any = {key: value for key, value in self._parameters.items() if key != "extra_bias"}
            stored = self.kernel.unprepare(self.spec, held)
            for key in held:
                del self._parameters[key]
            self._prepare(kernel, stored)

    def _prepare(self, kernel: Kernel, stored: dict[str, Tensor]) -> None:
        self.kernel = kernel
        for key, tensor in kernel.prepare(self.spec, stored).items():
            self.register_parameter(key, nn.Parameter(tensor, requires_grad=False))

    def extra_repr(self) -> str:
        spec = self.spec
        return (
            f"{spec.in_features}, {spec.out_features}, bits={spec.bits}, group_size={spec.group_size}, "
            f"sym={spec.sym}, act_order={spec.act_order}, kernel={self.kernel.name}"
        )


class DenseSegment(nn.Module):
    """A weight that is not quantized, beside others that are. weight: float [N, K]."""

    def __init__(self, piece: DensePiece, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(piece.weight.to(dtype), requires_grad=False)
        self.out_features = piece.weight.shape[0]

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: float [..., K], bias: [N] or None -> [..., N]."""
        return F.linear(x, self.weight, bias)

    def extra_repr(self) -> str:
        return f"{self.weight.shape[1]}, {self.out_features}, dtype={self.weight.dtype}"


class Segments(nn.Module):
    """``y = x @ W.T + bias`` with W in one or several segments along N.

    Args:
        pieces: in the order of the outputs, on the device to run on. Neighbours are joined where one call can do.
        dtype: of the model, for what is not quantized.
        backend: row of the kernel table, or None for the fastest that fits.
        expert: see ``select_kernel``.
    """

    def __init__(
        self, pieces: Sequence[AnyPiece], dtype: torch.dtype, backend: str | None, expert: bool = False
    ) -> None:
        super().__init__()
        self.parts = nn.ModuleList(
            QuantizedSegment(piece, backend, expert) if isinstance(piece, Piece) else DenseSegment(piece, dtype)
            for piece in joined(pieces)
        )
        ends = [0]
        for part in self.parts:
            ends.append(ends[-1] + part.out_features)  # type: ignore[operator,arg-type]
        self._ends, self.out_features = tuple(ends), ends[-1]
        # Looking up children and calling them as modules would cost as much as a small product.
        self._forwards = tuple(part.forward for part in self.parts)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: float [..., K], bias: [N] or None -> [..., N] in the dtype of x."""
        if len(self._forwards) == 1:
            return self._forwards[0](x, bias)
        outputs = []
        for i, multiply in enumerate(self._forwards):
            outputs.append(multiply(x, None if bias is None else bias[self._ends[i] : self._ends[i + 1]]))
        return torch.cat(outputs, dim=-1)

    def serve_alone(self) -> None:
        """See :meth:`QuantizedSegment.serve_alone`."""
        for part in self.parts:
            if isinstance(part, QuantizedSegment):
                part.serve_alone()

    @property
    def first(self) -> Tensor:
        """Some tensor of the weight, for who wants to know its device."""
        return next(self.parts[0].parameters())

    def describe(self) -> str:
        """What a graph compiled over this weight depends on."""
        return ";".join(
            f"{part.spec} {part.kernel.name} {part.extra_bias is None}"
            if isinstance(part, QuantizedSegment)
            else part.extra_repr()
            for part in self.parts
        )
