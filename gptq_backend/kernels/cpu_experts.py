"""The MLPs of a mixture's experts, and the weighted sum of their results, in one call (csrc/cpu/experts.h).

For a token or a few, what lies between the grouped products takes as long as they do.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .cpu import KERNEL, W4A8, WeightFields, _cpu, addresses
from .cpu_block import ACTIVATIONS
from .cpu_tensors import describe, dtype_code
from .devices import DTYPE_CODES
from .experts import Grouped

MOST_ROWS = 512  # tokens times experts of each, that are computed at a time: the memory between the products is kept


def why_not(gate_up: Grouped, down: Grouped) -> str | None:
    """``None``, or why the call cannot multiply by these."""
    for each in (gate_up, down):
        tensors = [tensor for tensor in each._parameters.values() if tensor is not None]
        if _cpu is None or each.row.kernel not in (KERNEL, W4A8) or not all(tensor.is_cpu for tensor in tensors):
            return f"the kernel {each.row.kernel.name} serves them"
        bias = each._parameters["bias"]
        if bias is not None and bias.dtype not in DTYPE_CODES:
            return f"their biases are {bias.dtype}"
    a, b = gate_up.spec, down.spec
    outputs = a.out_features * gate_up.stacked // down.stacked
    if outputs not in (b.in_features, 2 * b.in_features) or a.in_features != b.out_features:
        return f"they map {a.in_features} to {outputs} channels, and {b.in_features} to {b.out_features}"
    return None


class ExpertMLPs:
    """Runs ``down(activation(gate(x)) * up(x))`` of the experts that each token chose, and adds them up.

    Args:
        gate_up: of all experts gate and up, one weight with the outputs of both, or up alone.
        activation: one of ``cpu_block.ACTIVATIONS``.

    Raises:
        ValueError: see :func:`why_not`; or the activation is unknown.
    """

    def __init__(self, gate_up: Grouped, down: Grouped, activation: str) -> None:
        if (reason := why_not(gate_up, down)) is not None:
            raise ValueError(f"experts cannot run in one call: {reason}")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation={activation!r}; expected one of {', '.join(ACTIVATIONS)}")
        self._width, experts = down.spec.out_features, down.stacked
        linears = [_stack(each) for each in (gate_up, down)]
        self._kept = gate_up, down, linears
        self.native = _cpu.ExpertMLPs(
            linears[0], gate_up.stacked // experts, experts, ACTIVATIONS[activation], linears[1]
        )

    def __call__(self, x: Tensor, ids: Tensor, factors: Tensor) -> Tensor:
        """The weighted sum of the chosen experts' results, [T, H] in the dtype of x.

        Args:
            x: 16 bits or float32 [T, H].
            ids: int32 or int64 [T, k], the expert of each slot; outside of 0..experts-1 for none.
            factors: float [T, k].

        Raises:
            ValueError: shapes, dtypes or devices do not fit together.
        """
        code = dtype_code(x, self._width, "x")
        shape = ids.shape
        if (
            x.dim() != 2
            or len(shape) != 2
            or shape[0] != x.shape[0]
            or factors.shape != shape
            or ids.dtype not in (torch.int32, torch.int64)
            or not (ids.is_cpu and factors.is_cpu)
        ):
            raise ValueError(
                f"x is {describe(x)}, ids are {describe(ids)} and factors {describe(factors)}; expected [T, H], int32 "
                "or int64 [T, k] and [T, k] on cpu"
            )
        x, ids, factors = x.contiguous(), ids.contiguous(), factors.float().contiguous()
        y = torch.empty_like(x)
        _cpu.run_experts(
            self.native,
            code,
            *shape,
            x.data_ptr(),
            ids.data_ptr(),
            ids.itemsize,
            factors.data_ptr(),
            y.data_ptr(),
            torch.get_num_threads(),
        )
        return y


def _stack(grouped: Grouped) -> Any:
    """The first of the stacked weights, behind which the others lie."""
    w, bias = WeightFields(*grouped.layout), grouped._parameters["bias"]
    if bias is None:
        return _cpu.Linear(*addresses(w), 0, 0, w.a8)
    return _cpu.Linear(*addresses(w), bias.data_ptr(), DTYPE_CODES[bias.dtype], w.a8)
