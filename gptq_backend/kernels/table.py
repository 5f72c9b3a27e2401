"""The kernel table: every way to multiply by a quantized weight is one row, and ``select_kernel`` the only chooser."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

import torch

from ..errors import ConfigError
from ..format.weight import WeightSpec
from . import cpu, reference, self_check
from .cuda import operators as cuda
from .interface import ExpertKernel, Kernel
from .triton import operators as triton

logger = logging.getLogger(__name__)

# The first that serves is chosen, opt-in rows left out: fastest first. The reference serves everything.
KERNELS: list[Kernel] = [cpu.W4A8, cpu.KERNEL, cuda.KERNEL, triton.KERNEL, reference.KERNEL]
# Grouped products, likewise. For experts, a kernel that has one comes before all that have none.
EXPERT_KERNELS: list[ExpertKernel] = [cpu.W4A8_EXPERTS, cpu.EXPERTS, triton.EXPERTS]


def expert_kernel(kernel: Kernel) -> ExpertKernel | None:
    """The grouped product of ``kernel``, or None."""
    return next((row for row in EXPERT_KERNELS if row.kernel is kernel), None)


def kernel_report(spec: WeightSpec, device: torch.device) -> dict[str, str | None]:
    """``{row: None if it can serve spec on device, else why not}``, fastest first, without the opt-in rows.

    spec: of the weight in memory (``StoredSpec.weight``); in a file its codes may be narrower.
    """
    return {kernel.name: kernel.supports(spec, device) for kernel in KERNELS if not kernel.opt_in}


def fastest(report: Mapping[str, str | None], expert: bool = False) -> Kernel:
    """The row that is chosen after a ``report`` of :func:`kernel_report`; expert: see :func:`select_kernel`."""
    order = [row.kernel for row in EXPERT_KERNELS] * expert + KERNELS
    return next(kernel for kernel in order if kernel.name in report and report[kernel.name] is None)


def select_kernel(spec: WeightSpec, device: torch.device, name: str | None = None, expert: bool = False) -> Kernel:
    """The fastest row that serves ``spec`` on ``device``, or the row called ``name`` ("auto" and None choose).

    Before a row first serves such weights on a device, it is checked there (self_check.py). One that gives wrong
    results is left out, with a warning.

    expert: the weight is one of the experts of a mixture, which a grouped product serves faster than any other.

    Raises:
        ConfigError: no row of that name, or it cannot serve the layer (with its reason).
    """
    if name in (None, "auto"):
        report = kernel_report(spec, device)
        reasons = dict(report)
        while (why_not := _fault(chosen := fastest(reasons, expert), spec, device, expert)) is not None:
            reasons[chosen.name] = why_not
            _warn_once(
                f"the kernel {chosen.name!r} does not serve {spec.bits}-bit weights on {_describe(device)} (torch "
                f"{torch.__version__}): {why_not}. The next kernel serves, which is slower. Please report what "
                "'gptq-backend doctor' prints"
            )
        if chosen is reference.KERNEL:
            why = "; ".join(f"{row}: {reason}" for row, reason in reasons.items() if reason)
            _warn_once(f"the plain-torch reference kernel serves {device.type}; it is slow. {why}".strip())
        elif device.type == "cuda" and torch.version.hip is None and (reason := report.get("cuda")):
            _warn_once(f"the kernel {chosen.name} serves NVIDIA GPUs, where cuda would be faster: {reason}")
        return chosen
    for kernel in KERNELS:
        if kernel.name == name:
            if reason := kernel.supports(spec, device) or _fault(kernel, spec, device, expert):
                raise ConfigError(f"backend={name!r} cannot serve this layer on {device}: {reason}; use backend='auto'")
            return kernel
    raise ConfigError(f"backend={name!r} is not a kernel; choose 'auto' or one of {[k.name for k in KERNELS]}")


def _fault(kernel: Kernel, spec: WeightSpec, device: torch.device, expert: bool) -> str | None:
    return self_check.fault(kernel, spec, device, expert_kernel(kernel) if expert else None)


def _describe(device: torch.device) -> str:
    if device.type != "cuda":
        return device.type
    major, minor = torch.cuda.get_device_capability(device)
    return f"{torch.cuda.get_device_name(device)} (compute capability {major}.{minor})"


@functools.cache
def _warn_once(message: str) -> None:
    logger.warning(message)
