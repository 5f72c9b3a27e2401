"""Does a row of the table give right results on this device?  Found out once per process, by a small problem.

A kernel that was never run on a kind of device, a driver that miscompiles it or broken memory would otherwise be
noticed by what the model says, if at all.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Iterator

import torch
from torch.utils._device import DeviceContext

from ..errors import is_out_of_memory
from ..format import packing
from ..format.weight import PackedWeight, WeightSpec
from . import reference
from .expert_routing import Routing
from .interface import ExpertKernel, Kernel, PreparedWeight
from .operators import operators_are_recorded

VARIABLE = "GPTQ_BACKEND_SELF_CHECK"
DTYPES = torch.float16, torch.bfloat16
_ROWS = (1, 9, 40, 200)  # of x: one for each way in which rows of the table multiply
_CHANNELS, _OUTPUTS = 320, 272  # about; no power of two
_EXPERTS = 3
# Largest deviation of a result, in units of the results' root mean square: rounding the weight and the result to
# bfloat16 stays below a fiftieth, one channel left out is above a tenth. Of opt-in rows, which round x to 8 bits.
_LIMIT, _OPT_IN_LIMIT = 0.05, 0.2

_found: dict[tuple[object, ...], str | None] = {}
_lock = threading.Lock()


def fault(kernel: Kernel, spec: WeightSpec, device: torch.device, grouped: ExpertKernel | None = None) -> str | None:
    """Why ``kernel`` must not serve weights like ``spec`` on ``device``: what it got wrong there; None if nothing.

    grouped: its grouped product, where that is to serve as well.

    The answer is kept. Nothing is computed while a graph is captured or traced; then the answer is None, and not kept.
    """
    if kernel is reference.KERNEL or os.environ.get(VARIABLE, "1") in ("0", "false"):
        return None
    kind = spec.bits, _group_size(spec), spec.sym, spec.act_order, spec.scales_dtype
    key = kernel.name, kernel.gemm, grouped and grouped.gemm, device, *kind
    if key in _found:
        return _found[key]
    if _is_observed() or (device.type == "cuda" and torch.cuda.is_current_stream_capturing()):
        return None
    # Tensors that name no device lie on the CPU here, whatever the default device is.
    with _lock, torch.no_grad(), torch.inference_mode(False), torch.device("cpu"):
        if key not in _found:
            try:
                _found[key] = _wrong_results(kernel, spec, device, grouped)
            except Exception as error:
                if is_out_of_memory(error):  # says nothing of the kernel
                    return None
                _found[key] = f"it failed ({describe(error)})"
    return _found[key]


def _is_observed() -> bool:
    """Whether somebody would see what is computed here; a default device does not look."""
    modes = torch.overrides._get_current_function_mode_stack()
    return operators_are_recorded() or not all(isinstance(mode, DeviceContext) for mode in modes)


def describe(error: Exception) -> str:
    """In one line."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"


def forget() -> None:
    """Check all anew."""
    _found.clear()


def limit(kernel: Kernel) -> float:
    """The largest of :func:`deviations` that is right."""
    return _OPT_IN_LIMIT if kernel.opt_in else _LIMIT


Deviation = tuple[str, int, torch.dtype, float]


def deviations(kernel: Kernel, weight: PackedWeight, grouped: ExpertKernel | None = None) -> Iterator[Deviation]:
    """How far products are off the plain-torch ones at most, in units of the results' root mean square; NaN if one is
    NaN.

    Args:
        weight: of :func:`problem`.
        grouped: the kernel's grouped product, which is looked at as well.

    Yields:
        What was looked at, of how many rows of x, in which dtype, and the deviation.
    """
    yield from _deviations(kernel, weight)
    if grouped is not None:
        others = (problem(weight.spec, weight.qweight.device, seed) for seed in range(1, _EXPERTS))
        yield from _grouped_deviations(grouped, [weight, *others])


def _deviations(kernel: Kernel, weight: PackedWeight) -> Iterator[Deviation]:
    prepared = PreparedWeight.of(weight, kernel)
    dense = PreparedWeight.of(weight, reference.KERNEL).dequantize(torch.float32)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(max(_ROWS), weight.spec.in_features, generator=generator).to(dense.device)
    for dtype in DTYPES:
        expected = x.to(dtype).float() @ dense.t()
        unit = expected.square().mean().sqrt()
        for rows in _ROWS:
            found = prepared.multiply(x[:rows].to(dtype)).float()
            yield "results", rows, dtype, float((found - expected[:rows]).abs().max() / unit)


def _grouped_deviations(row: ExpertKernel, weights: list[PackedWeight]) -> Iterator[Deviation]:
    """Each row of x meets two of the weights, or none."""
    prepared = [PreparedWeight.of(weight, row.kernel) for weight in weights]
    dense = torch.stack([PreparedWeight.of(each, reference.KERNEL).dequantize(torch.float32) for each in weights])
    stack = {
        name: torch.stack([each.tensors[name] for each in prepared])
        for name in row.tensors
        if name in prepared[0].tensors
    }
    layout = (*map(stack.get, row.kernel.layout.tensors), *prepared[0].facts)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(max(_ROWS), dense.shape[2], generator=generator).to(dense.device)
    ids = torch.randint(-1, len(weights), (max(_ROWS), 2), generator=generator).to(dense.device)
    for dtype in DTYPES:
        every = torch.einsum("tk,enk->ten", x.to(dtype).float(), dense)
        expected = every.gather(1, ids.clamp(min=0)[:, :, None].expand(-1, -1, every.shape[2]))
        expected = (expected * (ids >= 0)[:, :, None]).flatten(0, 1)
        unit = every.square().mean().sqrt()
        for rows in _ROWS:
            found = row.gemm(x[:rows].to(dtype), layout, Routing(ids[:rows], len(weights)), 2, None).float()
            yield "grouped results", rows, dtype, float((found - expected[: 2 * rows]).abs().max() / unit)


def problem(spec: WeightSpec, device: torch.device, seed: int = 0) -> PackedWeight:
    """A small random weight like ``spec``. Those of other seeds can be stacked with it."""
    generator = torch.Generator().manual_seed(seed)
    size = _group_size(spec)
    groups = 1 if size is None else max(2, -(-_CHANNELS // size))
    channels = _CHANNELS if size is None else groups * size
    codes = torch.randint(0, 1 << spec.bits, (channels, _OUTPUTS), generator=generator, dtype=torch.uint8)
    zeros = torch.full((groups, _OUTPUTS), 1 << (spec.bits - 1), dtype=torch.uint8)
    if not spec.sym:
        zeros = torch.randint(0, 1 << spec.bits, zeros.shape, generator=generator, dtype=torch.uint8)
    scales = (0.5 + torch.rand(zeros.shape, generator=generator)) / (1 << spec.bits)
    g_idx = None
    if spec.act_order:
        g_idx = (torch.arange(channels, dtype=torch.int32) * groups // channels)[
            torch.randperm(channels, generator=generator)
        ]
    small = WeightSpec(
        channels, _OUTPUTS, spec.bits, channels // groups, groups, spec.sym, spec.act_order, spec.scales_dtype
    )
    qweight = packing.pack(codes, spec.bits)
    return PackedWeight(small, qweight, zeros, scales.to(spec.scales_dtype), g_idx).to(device)


def _group_size(spec: WeightSpec) -> int | None:
    """None for a single group."""
    return None if spec.groups == 1 else spec.group_size


def _wrong_results(kernel: Kernel, spec: WeightSpec, device: torch.device, grouped: ExpertKernel | None) -> str | None:
    weight = problem(spec, device)
    if kernel.supports(weight.spec, device) is not None:  # it serves other sizes only
        return None
    for what, rows, dtype, found in deviations(kernel, weight, grouped):
        if not found <= limit(kernel):
            amount = "NaN" if math.isnan(found) else f"off by {found:.2g} times what is usual for a result"
            return f"its {what} are wrong: {amount}, of {rows} rows in {str(dtype).removeprefix('torch.')}"
    return None
