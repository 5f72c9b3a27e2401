"""What a kernel is: one row of the table, the layout that its operators take, and a weight in that layout."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from ..format.weight import PackedWeight, WeightSpec
from .expert_routing import Routing

Tensors = dict[str, Tensor]
_SCHEMA = {Tensor: "Tensor", Tensor | None: "Tensor?", int: "int", bool: "bool"}


class Layout:
    """The arguments that describe a weight to the operators of a kernel; all that torch wants of them follows.

    Args:
        fields: a NamedTuple of the arguments, in order: first the prepared tensors by their names (optional ones as
            ``Tensor | None``), then attributes of the :class:`WeightSpec`, then ``constants``. It has ``in_features``
            and ``out_features``, as fields or properties.
        constants: what differs between rows that share the operators.

    Attributes:
        schema: of the arguments, for ``torch.library``.
        tensors: names of the first of them.
    """

    def __init__(self, fields: Callable[..., Any], constants: tuple[Any, ...] = ()) -> None:
        kinds = get_type_hints(fields)
        self.fields, self.constants = fields, constants
        self.schema = ", ".join(f"{_SCHEMA[kind]} {name}" for name, kind in kinds.items())
        self.tensors = tuple(name for name, kind in kinds.items() if kind in (Tensor, Tensor | None))
        self._facts = tuple(kinds)[len(self.tensors) : len(kinds) - len(constants)]

    def facts(self, spec: WeightSpec) -> tuple[Any, ...]:
        """The arguments behind the tensors."""
        return (*(getattr(spec, name) for name in self._facts), *self.constants)

    def arguments(self, spec: WeightSpec, tensors: Mapping[str, Any]) -> tuple[Any, ...]:
        """All arguments for one weight."""
        return (*map(tensors.get, self.tensors), *self.facts(spec))


@dataclass(frozen=True)
class Kernel:
    """One row of the kernel table.

    Args:
        name: what ``backend=NAME`` refers to.
        supports: ``(spec, device) -> None`` when the kernel can serve the weight, else the reason why not.
        prepare: ``packed weight -> tensors in the kernel's layout``, contiguous and on the same device. They include a
            ``qweight`` with at least three dimensions. ``g_idx``, where the weight has one, is put beside them.
        unprepare: ``(spec, tensors) -> (qweight, scales, zeros)`` of the packed weight, bit for bit; zeros may be None
            for a symmetric weight.
        layout: the arguments that describe the weight to the two operators.
        gemm: ``(x [..., K], *layout, bias [N] | None) -> y [..., N]`` in the dtype of x, called directly.
        op: the same through ``torch.ops``, for traces and gradients.
        dequantize: ``(*layout, dtype) -> weight [K, N]``, the transpose of ``nn.Linear.weight``, through ``torch.ops``.
        look_up: ``(ids int [...], *layout, dtype) -> [..., K]``: rows of ``nn.Linear.weight``, which an embedding of
            tokens is, through ``torch.ops``.
        opt_in: less exact than the others, hence never chosen unless asked for by name.
    """

    name: str
    supports: Callable[[WeightSpec, torch.device], str | None]
    prepare: Callable[[PackedWeight], Tensors]
    unprepare: Callable[[WeightSpec, Tensors], tuple[Tensor, Tensor, Tensor | None]]
    layout: Layout
    gemm: Callable[..., Tensor]
    op: Callable[..., Tensor]
    dequantize: Callable[..., Tensor]
    look_up: Callable[..., Tensor]
    opt_in: bool = False


@dataclass(frozen=True)
class ExpertKernel:
    """The grouped product of a kernel, for the experts of a mixture; see experts.py.

    Args:
        kernel: whose layout the stacked weights are in.
        tensors: names of the prepared tensors that are multiplied with; the others need not be stacked.
        gemm: ``(x [rows / top_k, K], layout, routing, top_k, bias [P*E, N] | None) -> y [rows, P*N]``: row r of y is
            row ``r // top_k`` of x times the weights of r's expert, side by side where there are several projections,
            or zeros. x: 16 bits or float32; layout: the kernel's arguments, of the stacked tensors.
        op: the same through ``torch.ops``, for traces.
        allocate: ``(like, shape) -> empty tensor`` for a stack.
    """

    kernel: Kernel
    tensors: tuple[str, ...]
    gemm: Callable[[Tensor, tuple[Any, ...], Routing, int, Tensor | None], Tensor]
    op: Callable[[Tensor, tuple[Any, ...], Routing, int, Tensor | None], Tensor]
    allocate: Callable[[Tensor, tuple[int, ...]], Tensor] = Tensor.new_empty


class PreparedWeight(NamedTuple):
    """A weight in the layout of the kernel that serves it. More tensors than the kernel's may lie beside them."""

    kernel: Kernel
    spec: WeightSpec
    tensors: Tensors
    facts: tuple[Any, ...]  # of the layout: found once, as they are on the way of every call

    @classmethod
    def of(cls, weight: PackedWeight, kernel: Kernel) -> PreparedWeight:
        """Repack ``weight`` for ``kernel``; its bias is left to the caller."""
        tensors = kernel.prepare(weight)
        if weight.g_idx is not None:
            tensors["g_idx"] = weight.g_idx
        return cls(kernel, weight.spec, tensors, kernel.layout.facts(weight.spec))

    def unprepare(self) -> PackedWeight:
        """Undo :meth:`of`; zeros that no channel uses may differ."""
        qweight, scales, zeros = self.kernel.unprepare(self.spec, self.tensors)
        if zeros is None:
            zeros = torch.full(scales.shape, 1 << (self.spec.bits - 1), dtype=torch.uint8, device=scales.device)
        return PackedWeight(self.spec, qweight, zeros, scales, self.tensors.get("g_idx"))

    def multiply(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """``x @ W.T + bias`` outside of traces, with gradients for x and bias where they are wanted.

        Args:
            x: float [..., K].
            bias: [N] or None.

        Returns:
            [..., N] in the dtype of x.
        """
        kernel, _, tensors, facts = self
        if type(x) is not Tensor or (
            torch.is_grad_enabled() and (x.requires_grad or (bias is not None and bias.requires_grad))
        ):
            return kernel.op(x, *map(tensors.get, kernel.layout.tensors), *facts, bias)
        return kernel.gemm(x, *map(tensors.get, kernel.layout.tensors), *facts, bias)

    def multiply_in_graph(self, parameters: Mapping[str, Any], x: Tensor, bias: Tensor | None) -> Tensor:
        """The same in a trace. parameters: ``tensors`` as the module's own attribute, by which the compiler knows
        that they are parameters.
        """
        return self.kernel.op(x, *map(parameters.get, self.kernel.layout.tensors), *self.facts, bias)

    def dequantize(self, dtype: torch.dtype, parameters: Mapping[str, Any] | None = None) -> Tensor:
        """[N, K], rounded once to ``dtype``. parameters: see :meth:`multiply_in_graph`."""
        tensors: Mapping[str, Any] = self.tensors if parameters is None else parameters
        wide = torch.promote_types(dtype, torch.float32)
        dense = self.kernel.dequantize(*map(tensors.get, self.kernel.layout.tensors), *self.facts, wide)
        return dense.t().to(dtype).contiguous()

    def look_up(self, ids: Tensor, dtype: torch.dtype, parameters: Mapping[str, Any] | None = None) -> Tensor:
        """Rows of the weight [N, K], rounded once to ``dtype``. ids: int [...] -> [..., K]. parameters: see
        :meth:`multiply_in_graph`.
        """
        tensors: Mapping[str, Any] = self.tensors if parameters is None else parameters
        return self.kernel.look_up(ids, *map(tensors.get, self.kernel.layout.tensors), *self.facts, dtype)

    def describe(self) -> str:
        """For the ``repr`` of modules."""
        return f"{self.spec.describe()}, kernel={self.kernel.name}"
