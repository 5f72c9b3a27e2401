"""Checks of the tensors whose addresses are handed to C++, where a wrong one would be read past its end."""

from __future__ import annotations

from torch import Tensor

from .devices import DTYPE_CODES


def describe(tensor: Tensor | None) -> str:
    if tensor is None:
        return "None"
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)} on {tensor.device}"


def dtype_code(x: Tensor, width: int, name: str) -> int:
    """The code of its dtype, if rows of ``width`` can be read."""
    code = DTYPE_CODES.get(x.dtype)
    if code is None or not x.is_cpu or not x.dim() or x.size(-1) != width:
        raise ValueError(
            f"{name} is {describe(x)}; expected float32, bfloat16 or float16 with a last dimension of {width} on cpu"
        )
    return code


def vector_code(x: Tensor, size: int, name: str) -> int:
    if x.dim() != 1 or not x.is_contiguous():
        raise ValueError(f"{name} is {describe(x)} with strides {x.stride()}; expected a contiguous vector")
    return dtype_code(x, size, name)


def address(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
