"""Products with weights that are not quantized, of few rows, on a CPU (csrc/cpu/dense.h)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .cpu import _cpu
from .cpu_tensors import address, describe, dtype_code, vector_code

# With more rows it is the arithmetic that takes the time, and torch's own is as fast.
FEW_ROWS = 8


@dataclass(frozen=True)
class Dense:
    """A weight that is not quantized: 16 bits or float32 [N, K], and its bias [N] of any of these dtypes or None."""

    weight: Tensor
    bias: Tensor | None = None

    @property
    def out_features(self) -> int:
        return self.weight.shape[0]

    @property
    def native(self) -> Any:
        weight, bias = self.weight, self.bias
        if weight.dim() != 2 or not weight.is_contiguous():
            raise ValueError(f"a weight is {describe(weight)} with strides {weight.stride()}; expected [N, K] in rows")
        outputs, width = weight.shape
        code = 0 if bias is None else vector_code(bias, outputs, "a bias")
        return _cpu.Dense(weight.data_ptr(), dtype_code(weight, width, "a weight"), outputs, width, address(bias), code)


class Product:
    """``x @ weight.t() + bias``, summed in float32.

    Raises:
        ValueError: a tensor is none that is read.
    """

    def __init__(self, dense: Dense) -> None:
        self.native, self._kept = dense.native, dense
        self._outputs, self.width = dense.weight.shape

    def __call__(self, x: Tensor) -> Tensor:
        """x: 16 bits or float32 [..., K] -> [..., N] in the dtype of x."""
        code = dtype_code(x, self.width, "x")
        x = x.contiguous()
        y = x.new_empty((*x.shape[:-1], self._outputs))
        rows = x.numel() // self.width
        _cpu.multiply(self.native, code, rows, x.data_ptr(), y.data_ptr(), torch.get_num_threads())
        return y
