"""The prepared weight of one layer: segments side by side along the output, each with a kernel of its own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptq_backend import PackedWeight, select_kernel
from gptq_backend.kernels import PreparedWeight

from .pieces import AnyPiece, DensePiece, joined


class QuantizedSegment(nn.Module):
    """A quantized weight [K, N] in the layout of the kernel that serves it; its parameters are the kernel's."""

    prepared: PreparedWeight

    def __init__(self, weight: PackedWeight, backend: str | None, expert: bool = False) -> None:
        super().__init__()
        self.out_features, self._backend = weight.out_features, backend
        self.extra_bias = None if weight.bias is None else nn.Parameter(weight.bias, requires_grad=False)
        self._hold(PreparedWeight.of(weight, select_kernel(weight.spec, weight.qweight.device, backend, expert)))

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: float [..., K], bias: [N] or None -> [..., N] in the dtype of x."""
        if self.extra_bias is not None:
            bias = self.extra_bias if bias is None else bias + self.extra_bias
        if torch.compiler.is_compiling():
            return self.prepared.multiply_in_graph(self._parameters, x, bias)
        return self.prepared.multiply(x, bias)

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of W.T [N, K]. ids: int [...] -> [..., K] in ``dtype``."""
        return self.prepared.look_up(ids, dtype, self._parameters if torch.compiler.is_compiling() else None)

    def serve_alone(self) -> None:
        """Take back what being an expert had to do with the choice of the kernel."""
        weight = self.prepared
        kernel = select_kernel(weight.spec, weight.tensors["qweight"].device, self._backend)
        if kernel is not weight.kernel:
            self._hold(PreparedWeight.of(weight.unprepare(), kernel))

    def _hold(self, weight: PreparedWeight) -> None:
        tensors: Any = {key: nn.Parameter(tensor, requires_grad=False) for key, tensor in weight.tensors.items()}
        self._parameters = {"extra_bias": self.extra_bias, **tensors}
        # The same dictionary: whoever puts others in their place, as vLLM's offloading does, is heard.
        self.prepared = weight._replace(tensors=self._parameters)  # type: ignore[arg-type]

    def extra_repr(self) -> str:
        return self.prepared.describe()


class DenseSegment(nn.Module):
    """A weight that is not quantized, beside others that are. weight: float [N, K]."""

    def __init__(self, piece: DensePiece, dtype: torch.dtype) -> None:
        super().__init__()
        self.weight = nn.Parameter(piece.weight.to(dtype), requires_grad=False)
        self.extra_bias = None if piece.bias is None else nn.Parameter(piece.bias.to(dtype), requires_grad=False)
        self.out_features = piece.weight.shape[0]

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """x: float [..., K], bias: [N] or None -> [..., N]."""
        if self.extra_bias is not None:
            bias = self.extra_bias if bias is None else bias + self.extra_bias
        return F.linear(x, self.weight, bias)

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """As of a :class:`QuantizedSegment`."""
        return F.embedding(ids, self.weight).to(dtype)

    def extra_repr(self) -> str:
        biased = ", biased" if self.extra_bias is not None else ""
        return f"{self.weight.shape[1]}, {self.out_features}, dtype={self.weight.dtype}{biased}"


class FusedWeight(nn.Module):
    """``y = x @ W.T + bias`` with W in one or several segments along N.

    Args:
        pieces: in the order of the outputs, on the device to run on. Neighbours are joined where one call can do.
        dtype: of the model, for what is not quantized.
    """

    def __init__(
        self, pieces: Sequence[AnyPiece], dtype: torch.dtype, backend: str | None, expert: bool = False
    ) -> None:
        super().__init__()
        parts = [
            QuantizedSegment(piece, backend, expert) if isinstance(piece, PackedWeight) else DenseSegment(piece, dtype)
            for piece in joined(pieces)
        ]
        self.parts = nn.ModuleList(parts)
        self._sizes = [part.out_features for part in parts]
        self.out_features = sum(self._sizes)
        # Looking up children and calling them as modules would cost as much as a small product.
        self._forwards = tuple(part.forward for part in parts)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x: float [..., K], bias: [N] or None -> [..., N] in the dtype of x."""
        if len(self._forwards) == 1:
            return self._forwards[0](x, bias)
        biases = [None] * len(self._sizes) if bias is None else bias.split(self._sizes)
        return torch.cat([multiply(x, part) for multiply, part in zip(self._forwards, biases)], dim=-1)

    def look_up(self, ids: Tensor, dtype: torch.dtype) -> Tensor:
        """Rows of W.T [N, K], which is one segment. ids: int [...] -> [..., K] in ``dtype``."""
        (part,) = self.parts
        rows: Tensor = part.look_up(ids, dtype)  # type: ignore[operator]
        return rows

    def serve_alone(self) -> None:
        """See :meth:`QuantizedSegment.serve_alone`."""
        for part in self.parts:
            if isinstance(part, QuantizedSegment):
                part.serve_alone()

    @property
    def kernels(self) -> set[str]:
        """Names of the kernels that multiply the quantized segments."""
        return {part.prepared.kernel.name for part in self.parts if isinstance(part, QuantizedSegment)}

    def describe(self) -> str:
        """What a graph compiled over this weight depends on."""
        return ";".join(
            f"{part.prepared.spec} {part.prepared.kernel.name} {part.extra_bias is None}"
            if isinstance(part, QuantizedSegment)
            else part.extra_repr()
            for part in self.parts
        )
