"""Gradients of the products, which all kernels define alike."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def register_gradients(library: torch.library.Library, name: str, dense: Any) -> None:
    """Gradients for ``op(x, *layout, bias)`` with respect to x and bias; the quantized weight is not trainable.

    Args:
        name: of the op, e.g. "gptq_backend::gemm".
        dense: ``(*layout, dtype) -> [N, K]``, the weight, through an op, so that it can be traced.
    """

    def save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, *layout, bias = inputs
        ctx.save_for_backward(*(each for each in layout if isinstance(each, Tensor)))
        ctx.layout = [None if isinstance(each, Tensor) else [each] for each in layout]
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            tensors = iter(ctx.saved_tensors)
            layout = [next(tensors) if each is None else each[0] for each in ctx.layout]
            grad_x = grad @ dense(*layout, grad.dtype)
        if ctx.needs_input_grad[-1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return (grad_x, *[None] * len(ctx.layout), grad_bias)

    torch.library.register_autograd(name, backward, setup_context=save, lib=library)
