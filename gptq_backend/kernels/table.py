"""The kernel table: every way to multiply by a quantized weight is one row, and ``select_kernel`` the only chooser."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import ConfigError
from ..format.weight import LinearSpec
from . import cpu
from . import experts as moe
from . import reference as ops
from .cuda import layout as cuda_layout
from .cuda import operators as cuda
from .slots import Tensors
from .triton import layout as triton_layout
from .triton import operators as triton_ops

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Kernel:
    """One row of the table.

    Args:
        name: what ``backend=NAME`` refers to.
        supports: ``(spec, device) -> None`` when the kernel can serve it, else the reason why not.
        prepare: ``(spec, checkpoint tensors) -> tensors in the kernel's layout``; bias excluded.
        unprepare: the exact inverse, bit for bit.
        apply: ``(spec, prepared, x [..., K], bias [N] | None) -> y [..., N]`` in the dtype of x.
        op: the same call through ``torch.ops``, used while tracing or when a gradient is needed.
        dequantize: ``(spec, prepared, dtype) -> weight [K, N]``, the transpose of ``nn.Linear.weight``, through
            ``torch.ops``; None: the layer goes through ``unprepare``.
        opt_in: less exact than the others, hence never chosen unless asked for by name.
        moe: the grouped product for experts, where there is one.
    """

    name: str
    supports: Callable[[LinearSpec, torch.device], str | None]
    prepare: Callable[[LinearSpec, Tensors], Tensors]
    unprepare: Callable[[LinearSpec, Tensors], Tensors]
    apply: Callable[[LinearSpec, Tensors, Tensor, Tensor | None], Tensor]
    op: Callable[[LinearSpec, Tensors, Tensor, Tensor | None], Tensor]
    dequantize: Callable[[LinearSpec, Tensors, torch.dtype], Tensor] | None = None
    opt_in: bool = False
    moe: moe.MoeKernel | None = None


def _reference(
    gemm: Callable[..., Tensor], spec: LinearSpec, prepared: Tensors, x: Tensor, bias: Tensor | None
) -> Tensor:
    return gemm(x, *ops.arguments(spec, prepared), bias)


def _dequantize(
    operator: str,
    arguments: Callable[[LinearSpec, Tensors], tuple[Any, ...]],
    spec: LinearSpec,
    prepared: Tensors,
    dtype: torch.dtype,
) -> Tensor:
    weight: Tensor = getattr(torch.ops.gptq_backend, operator)(*arguments(spec, prepared), dtype)
    return weight


REFERENCE = Kernel(
    name="reference",
    supports=lambda spec, device: None,
    prepare=lambda spec, tensors: tensors,
    unprepare=lambda spec, prepared: prepared,
    apply=functools.partial(_reference, ops.gemm),
    op=functools.partial(_reference, ops.op),
    dequantize=functools.partial(_dequantize, "dequantize", ops.arguments),
)

_dequantize_cpu = functools.partial(_dequantize, "cpu_dequantize", functools.partial(cpu.arguments, a8=False))
CPU = Kernel("cpu", cpu.supports, cpu.prepare, cpu.unprepare, cpu.apply, cpu.op, _dequantize_cpu, moe=moe.CPU)
CUDA = Kernel(
    "cuda",
    cuda.supports,
    cuda_layout.prepare,
    cuda_layout.unprepare,
    cuda.apply,
    cuda.op,
    functools.partial(_dequantize, "cuda_dequantize", cuda.arguments),
)
CPU_W4A8 = Kernel(
    "cpu_w4a8",
    cpu.supports,
    cpu.prepare,
    cpu.unprepare,
    cpu.apply_w4a8,
    cpu.op_w4a8,
    _dequantize_cpu,
    opt_in=True,
    moe=moe.CPU_W4A8,
)
TRITON = Kernel(
    "triton",
    triton_ops.supports,
    triton_layout.prepare,
    triton_layout.unprepare,
    triton_ops.apply,
    triton_ops.op,
    triton_ops.dequantize_op,
    moe=moe.TRITON,
)

# Fastest first. The reference serves everything and therefore comes last.
KERNELS: list[Kernel] = [CPU_W4A8, CPU, CUDA, TRITON, REFERENCE]


def kernel_report(spec: LinearSpec, device: torch.device) -> dict[str, str | None]:
    """``{row: None if it can serve spec on device, else why not}``, fastest first, without the opt-in rows."""
    return {kernel.name: kernel.supports(spec, device) for kernel in KERNELS if not kernel.opt_in}


def fastest(report: Mapping[str, str | None], expert: bool = False) -> Kernel:
    """The row that is chosen after a ``report`` of :func:`kernel_report`; expert: see :func:`select_kernel`."""
    serving = [kernel for kernel in KERNELS if kernel.name in report and report[kernel.name] is None]
    return next((kernel for kernel in serving if expert and kernel.moe), serving[0])


def select_kernel(spec: LinearSpec, device: torch.device, name: str | None = None, expert: bool = False) -> Kernel:
    """The fastest row that serves ``spec`` on ``device``, or the row called ``name`` ("auto" and None choose).

    expert: the layer is one of the experts of a mixture, for which a row with a grouped product is faster than any
    without.

    Raises:
        ConfigError: no row of that name, or it cannot serve the layer (with its reason).
    """
    if name in (None, "auto"):
        reasons = kernel_report(spec, device)
        chosen = fastest(reasons, expert)
        if chosen is REFERENCE:
            why = "; ".join(f"{row}: {reason}" for row, reason in reasons.items() if reason)
            _warn_once(f"the plain-torch reference kernel serves {device.type}; it is slow. {why}".strip())
        return chosen
    for kernel in KERNELS:
        if kernel.name == name:
            if reason := kernel.supports(spec, device):
                raise ConfigError(f"backend={name!r} cannot serve this layer on {device}: {reason}; use backend='auto'")
            return kernel
    raise ConfigError(f"backend={name!r} is not a kernel; choose 'auto' or one of {[k.name for k in KERNELS]}")


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
