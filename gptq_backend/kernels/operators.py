"""What the operators of all kernels have in common: schema, fake kernels, gradients, and the check of their input."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def define_operators(
    library: torch.library.Library,
    prefix: str,
    layout: str,
    gemm: Callable[..., Tensor],
    dequantize: Callable[..., Tensor],
    out_features: Callable[..., int] | None = None,
    dispatch: str = "CompositeExplicitAutograd",
    by_output: bool = False,
    register_inference: Callable[[str], None] | None = None,
) -> Callable[..., Tensor]:
    """Register the operators of a kernel, with all that torch wants of them.

    ``gptq_backend::{prefix}gemm`` has gradients with respect to x and bias (the quantized weight is not trainable), by
    ``gptq_backend::{prefix}dequantize``. ``gptq_backend::{prefix}gemm_inference`` is the same product without them:
    torch calls Python twice more for an operator whose gradients are defined in Python, in compiled graphs too.

    Args:
        library: of the namespace gptq_backend.
        layout: schema of the arguments that describe the weight, common to both; with ``in_features`` = K.
        gemm: ``(x [..., K], *layout, bias [N] | None) -> y [..., N]`` in the dtype of x.
        dequantize: ``(*layout, dtype) -> [K, N]``, the transpose of ``nn.Linear.weight``.
        out_features: N, where the layout does not say; takes it by keywords.
        dispatch: key that both are registered for.
        by_output: the result of ``dequantize`` lies in memory as [N, K].
        register_inference: gives the operator of that name another implementation than ``gemm``.

    Returns:
        ``gemm`` through whichever of the two operators suffices.
    """
    product, dense = f"gptq_backend::{prefix}gemm", f"gptq_backend::{prefix}dequantize"
    for name in ("gemm", "gemm_inference"):
        library.define(f"{prefix}{name}(Tensor x, {layout}, Tensor? bias) -> Tensor")
    library.define(f"{prefix}dequantize({layout}, ScalarType dtype) -> Tensor")
    library.impl(f"{prefix}gemm", gemm, dispatch)
    library.impl(f"{prefix}dequantize", dequantize, dispatch)
    if register_inference is None:
        library.impl(f"{prefix}gemm_inference", gemm, dispatch)
    else:
        register_inference(f"{prefix}gemm_inference")

    names = [argument.split()[-1] for argument in layout.split(", ")]

    def features(weight: Sequence[Any]) -> tuple[int, int]:
        """K and N."""
        by_name = dict(zip(names, weight, strict=True))
        return by_name["in_features"], out_features(**by_name) if out_features else by_name["out_features"]

    def fake_gemm(x: Tensor, *arguments: Any) -> Tensor:
        *weight, bias = arguments
        inputs, outputs = features(weight)
        check_input(x, weight[0].device, inputs, outputs, bias)
        return x.new_empty((*x.shape[:-1], outputs))

    def fake_dequantize(*arguments: Any) -> Tensor:
        *weight, dtype = arguments
        inputs, outputs = features(weight)
        if by_output:
            return weight[0].new_empty((outputs, inputs), dtype=dtype).t()
        return weight[0].new_empty((inputs, outputs), dtype=dtype)

    torch.library.register_fake(product, fake_gemm, lib=library)
    torch.library.register_fake(f"{product}_inference", fake_gemm, lib=library)
    torch.library.register_fake(dense, fake_dequantize, lib=library)

    def save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _, *weight, bias = inputs
        ctx.save_for_backward(*(each for each in weight if isinstance(each, Tensor)))
        ctx.weight = [None if isinstance(each, Tensor) else [each] for each in weight]
        ctx.bias_dtype = None if bias is None else bias.dtype

    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        grad_x = grad_bias = None
        if ctx.needs_input_grad[0]:
            tensors = iter(ctx.saved_tensors)
            weight = [next(tensors) if each is None else each[0] for each in ctx.weight]
            # Through the operator, so that it can be traced.
            grad_x = grad @ getattr(torch.ops.gptq_backend, f"{prefix}dequantize")(*weight, grad.dtype).t()
        if ctx.needs_input_grad[-1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return (grad_x, *[None] * len(ctx.weight), grad_bias)

    torch.library.register_autograd(product, backward, setup_context=save, lib=library)
    with_gradients = getattr(torch.ops.gptq_backend, f"{prefix}gemm").default
    without = getattr(torch.ops.gptq_backend, f"{prefix}gemm_inference").default

    def op(*arguments: Any) -> Tensor:
        return (with_gradients if torch.is_grad_enabled() else without)(*arguments)

    return op


def check_input(x: Tensor, device: torch.device, in_features: int, out_features: int, bias: Tensor | None) -> None:
    """Refuse what a kernel would misread.

    Raises:
        ValueError: x is not a floating-point tensor [..., K] on ``device``, or bias is not [N] on it.
    """
    if x.device != device or not x.is_floating_point() or x.shape[-1:] != (in_features,):
        raise ValueError(
            f"x is {x.dtype} {tuple(x.shape)} on {x.device}, expected floating point with a last dimension of "
            f"{in_features} on {device}"
        )
    if bias is not None and (bias.device != device or bias.shape != (out_features,)):
        raise ValueError(f"bias is {tuple(bias.shape)} on {bias.device}, expected ({out_features},) on {device}")


def check_prepared(qweight: Tensor) -> None:
    """Refuse a checkpoint's words where a kernel expects its own; every prepared layout has at least 3 dimensions.

    Raises:
        ValueError: it has fewer, as after ``functional_call`` with a ``state_dict()``.
    """
    if qweight.dim() < 3:
        raise ValueError(
            f"qweight is {tuple(qweight.shape)}, a checkpoint's words in place of those that prepare() made of them; "
            "give torch.func.functional_call the layer's named_parameters(), not its state_dict(), or unprepare() it"
        )
