"""What the operators of all kernels have in common: schema, fake kernels, gradients, and the check of their input."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .interface import Layout

# Keeps what it has registered: an operator whose library is gone crashes.
_LIBRARY = torch.library.Library("gptq_backend", "FRAGMENT")


def define_operators(
    prefix: str,
    layout: Layout,
    gemm: Callable[..., Tensor],
    dequantize: Callable[..., Tensor],
    look_up: Callable[..., Tensor],
    dispatch: str = "CompositeExplicitAutograd",
    by_output: bool = False,
    gradient: Callable[..., Tensor] | None = None,
    register_inference: Callable[[str], None] | None = None,
) -> tuple[Callable[..., Tensor], Callable[..., Tensor], Callable[..., Tensor]]:
    """Register the operators of a kernel, with all that torch wants of them -> ``op``, ``dequantize`` and ``look_up``
    of its row.

    ``gptq_backend::{prefix}gemm`` has gradients with respect to x and bias (the quantized weight is not trainable), by
    ``gptq_backend::{prefix}gradient`` where there is one, else by ``gptq_backend::{prefix}dequantize``.
    ``gptq_backend::{prefix}gemm_inference`` is the same product without them: torch calls Python twice more for an
    operator whose gradients are defined in Python, in compiled graphs too.

    Args:
        prefix: of the operators' names.
        layout: of the weight; its fields include ``qweight``.
        gemm: ``(x [..., K], *layout, bias [N] | None) -> y [..., N]`` in the dtype of x.
        dequantize: ``(*layout, dtype) -> [K, N]``, the transpose of ``nn.Linear.weight``.
        look_up: ``(ids int [...], *layout, dtype) -> [..., K]``, rows of ``nn.Linear.weight``.
        dispatch: key that all are registered for.
        by_output: the result of ``dequantize`` lies in memory as [N, K].
        gradient: ``(y_grad [..., N], *layout) -> x_grad [..., K]`` in the dtype of y_grad.
        register_inference: gives the operator of that name another implementation than ``gemm``.
    """
    for name in ("gemm", "gemm_inference"):
        _LIBRARY.define(f"{prefix}{name}(Tensor x, {layout.schema}, Tensor? bias) -> Tensor")
    _LIBRARY.define(f"{prefix}dequantize({layout.schema}, ScalarType dtype) -> Tensor")
    look_up_op = define_lookup(f"{prefix}look_up", layout, look_up, lambda weight: weight.in_features, dispatch)
    _LIBRARY.impl(f"{prefix}gemm", gemm, dispatch)
    _LIBRARY.impl(f"{prefix}dequantize", dequantize, dispatch)
    if register_inference is None:
        _LIBRARY.impl(f"{prefix}gemm_inference", gemm, dispatch)
    else:
        register_inference(f"{prefix}gemm_inference")
    _register_fakes(prefix, layout, by_output)
    packets = torch.ops.gptq_backend
    dense = getattr(packets, f"{prefix}dequantize")
    if gradient is None:
        _register_gradients(prefix, lambda grad, *weight: grad @ dense(*weight, grad.dtype).t())
    else:
        _LIBRARY.define(f"{prefix}gradient(Tensor y_grad, {layout.schema}) -> Tensor")
        _LIBRARY.impl(f"{prefix}gradient", gradient, dispatch)
        _register_gradient_operator(prefix, layout)
        _register_gradients(prefix, getattr(packets, f"{prefix}gradient"))
    with_gradients = getattr(packets, f"{prefix}gemm").default
    without = getattr(packets, f"{prefix}gemm_inference").default

    def op(*arguments: Any) -> Tensor:
        return (with_gradients if torch.is_grad_enabled() else without)(*arguments)

    return op, dense, look_up_op


def define_lookup(
    name: str,
    layout: Layout,
    look_up: Callable[..., Tensor],
    width: Callable[[Any], int],
    dispatch: str = "CompositeExplicitAutograd",
) -> Callable[..., Tensor]:
    """Register ``gptq_backend::{name}``: rows of a weight by their numbers.

    Args:
        look_up: ``(ids int [...], *layout, dtype) -> [..., width]`` in ``dtype``.
        width: of a row, by the layout's fields.
    """

    def fake(ids: Tensor, *rest: Any) -> Tensor:
        check_ids(ids, rest[0].device)
        return ids.new_empty((*ids.shape, width(layout.fields(*rest[:-1]))), dtype=rest[-1])

    _LIBRARY.define(f"{name}(Tensor ids, {layout.schema}, ScalarType dtype) -> Tensor")
    _LIBRARY.impl(name, look_up, dispatch)
    torch.library.register_fake(f"gptq_backend::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Tensor] = getattr(torch.ops.gptq_backend, name)
    return operator


def _register_fakes(prefix: str, layout: Layout, by_output: bool) -> None:
    """Shapes and dtypes of the results, for traces."""

    def fake_gemm(x: Tensor, *arguments: Any) -> Tensor:
        weight, bias = layout.fields(*arguments[:-1]), arguments[-1]
        check_input(x, weight.qweight.device, weight.in_features, weight.out_features, bias)
        return x.new_empty((*x.shape[:-1], weight.out_features))

    def fake_dequantize(*arguments: Any) -> Tensor:
        weight, dtype = layout.fields(*arguments[:-1]), arguments[-1]
        inputs, outputs = weight.in_features, weight.out_features
        if by_output:
            return weight.qweight.new_empty((outputs, inputs), dtype=dtype).t()
        return weight.qweight.new_empty((inputs, outputs), dtype=dtype)

    for name in ("gemm", "gemm_inference"):
        torch.library.register_fake(f"gptq_backend::{prefix}{name}", fake_gemm, lib=_LIBRARY)
    torch.library.register_fake(f"gptq_backend::{prefix}dequantize", fake_dequantize, lib=_LIBRARY)


def _register_gradients(prefix: str, gradient: Callable[..., Tensor]) -> None:
    """Of ``gemm``, with respect to x and bias. gradient: through operators, so that it can be traced."""

    def save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _save_weight(ctx, inputs[1:-1])
        ctx.bias_dtype = None if inputs[-1] is None else inputs[-1].dtype

    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        weight = _saved_weight(ctx)
        grad_x = gradient(grad, *weight) if ctx.needs_input_grad[0] else None
        grad_bias = None
        if ctx.needs_input_grad[-1]:
            grad_bias = grad.reshape(-1, grad.shape[-1]).sum(0).to(ctx.bias_dtype)
        return (grad_x, *[None] * len(weight), grad_bias)

    torch.library.register_autograd(f"gptq_backend::{prefix}gemm", backward, setup_context=save, lib=_LIBRARY)


def _register_gradient_operator(prefix: str, layout: Layout) -> None:
    """Fake and gradient of ``gradient``, whose own gradient is the product."""

    def fake(y_grad: Tensor, *arguments: Any) -> Tensor:
        weight = layout.fields(*arguments)
        check_input(y_grad, weight.qweight.device, weight.out_features, weight.in_features, None)
        return y_grad.new_empty((*y_grad.shape[:-1], weight.in_features))

    def save(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        _save_weight(ctx, inputs[1:])

    def backward(ctx, grad: Tensor):  # type: ignore[no-untyped-def]
        weight = _saved_weight(ctx)
        gemm = getattr(torch.ops.gptq_backend, f"{prefix}gemm")
        return (gemm(grad, *weight, None), *[None] * len(weight))

    name = f"gptq_backend::{prefix}gradient"
    torch.library.register_fake(name, fake, lib=_LIBRARY)
    torch.library.register_autograd(name, backward, setup_context=save, lib=_LIBRARY)


def _save_weight(ctx, weight) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*(each for each in weight if isinstance(each, Tensor)))
    ctx.weight = [None if isinstance(each, Tensor) else [each] for each in weight]


def _saved_weight(ctx) -> list[Any]:  # type: ignore[no-untyped-def]
    tensors = iter(ctx.saved_tensors)
    return [next(tensors) if each is None else each[0] for each in ctx.weight]


def define_grouped(
    name: str,
    layout: Layout,
    arguments: str,
    moe_gemm: Callable[..., Tensor],
    shape: Callable[..., tuple[int, int]],
    dispatch: str = "CompositeExplicitAutograd",
) -> Callable[..., Tensor]:
    """Register ``gptq_backend::{name}``, a grouped product, whose weights have a leading dimension.

    Args:
        layout, dispatch: as for :func:`define_operators`.
        arguments: schema of those behind the layout, the last of them a bias.
        moe_gemm: ``(x, *layout, *arguments) -> y``.
        shape: ``(x, layout, *arguments) -> shape of y``.
    """

    def fake(x: Tensor, *rest: Any) -> Tensor:
        count = len(layout.fields._fields)  # type: ignore[attr-defined]
        return x.new_empty(shape(x, layout.fields(*rest[:count]), *rest[count:]))

    _LIBRARY.define(f"{name}(Tensor x, {layout.schema}, {arguments}) -> Tensor")
    _LIBRARY.impl(name, moe_gemm, dispatch)
    torch.library.register_fake(f"gptq_backend::{name}", fake, lib=_LIBRARY)
    operator: Callable[..., Tensor] = getattr(torch.ops.gptq_backend, name)
    return operator


def define_without_gradients(
    name: str,
    schema: str,
    function: Callable[..., Any],
    fake: Callable[..., Any],
    dispatch: str,
    register_inference: Callable[[str], None] | None,
) -> Callable[..., Any]:
    """Register ``gptq_backend::{name}`` and ``gptq_backend::{name}_inference``, which do the same -> the second.

    Args:
        schema: what follows the name.
        dispatch, register_inference: as for :func:`define_operators`.
    """
    for each in (name, f"{name}_inference"):
        _LIBRARY.define(each + schema)
        torch.library.register_fake(f"gptq_backend::{each}", fake, lib=_LIBRARY)
    _LIBRARY.impl(name, function, dispatch)
    if register_inference is None:
        _LIBRARY.impl(f"{name}_inference", function, dispatch)
    else:
        register_inference(f"{name}_inference")
    operator: Callable[..., Any] = getattr(torch.ops.gptq_backend, f"{name}_inference").default
    return operator


def operators_are_seen() -> bool:
    """Whether somebody looks at operators, so that nothing may be computed without them: a graph that is being made, a
    mode of torch (FLOP counters, fake tensors), or functorch.
    """
    return operators_are_recorded() or bool(torch._C._len_torch_function_stack())


def operators_are_recorded() -> bool:
    """Likewise, but for modes of Python functions, which a default device is one of."""
    return bool(
        torch.compiler.is_compiling()
        or torch._C._get_tracing_state()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._are_functorch_transforms_active()
    )


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


def check_ids(ids: Tensor, device: torch.device, rows: int | None = None) -> None:
    """Refuse numbers of rows that cannot be looked up.

    Args:
        rows: how many there are; compared on a CPU only, since elsewhere it would be a wait for the device.

    Raises:
        ValueError: no int32 or int64 tensor on ``device``. IndexError: there is no such row.
    """
    if ids.device != device or ids.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"ids are {ids.dtype} on {ids.device}, expected int32 or int64 on {device}")
    if rows is not None and ids.is_cpu and ids.numel():
        low, high = (int(each) for each in torch.aminmax(ids))
        if low < 0 or high >= rows:
            bad = low if low < 0 else high
            raise IndexError(
                f"token id {bad} is not in the vocabulary of {rows}; tokenize with the model's own tokenizer"
            )


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
