"""What the tests of all kernels share: a weight in a kernel's layout, the exact product, and how far off is too far."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from gptq_backend import Kernel, PackedWeight, QuantizedWeight
from gptq_backend.format import encode, read_packed
from gptq_backend.kernels import PreparedWeight, cpu

ROOT = Path(__file__).parents[2]
native = pytest.mark.skipif(cpu._cpu is None, reason="the native extension was not built")
# Norm-relative, against float64. 16-bit results carry the rounding of their own dtype.
LIMITS = {torch.float32: 1e-6, torch.bfloat16: 4e-3, torch.float16: 5e-4}


def packed(weight: QuantizedWeight) -> PackedWeight:
    return read_packed(*encode(weight), "layer")


def prepared(weight: QuantizedWeight, kernel: Kernel) -> PreparedWeight:
    return PreparedWeight.of(packed(weight), kernel)


def exact(weight: QuantizedWeight, x: Tensor, bias: Tensor | None = None) -> Tensor:
    y = x.double() @ weight.dequantize(torch.float64).t()
    return y if bias is None else y + bias.double()


def error(y: Tensor, expected: Tensor) -> float:
    return float((y - expected).norm() / expected.norm())


def assert_same_packed(found: PackedWeight, expected: PackedWeight) -> None:
    """Bit for bit; where no group is empty also the zeros."""
    rows = expected.qweight.shape[0]
    assert found.spec == expected.spec
    assert torch.equal(found.qweight[:rows], expected.qweight)
    assert not found.qweight[rows:].any()
    assert found.scales.dtype == expected.scales.dtype
    assert torch.equal(found.scales, expected.scales)
    used = slice(None) if expected.g_idx is None else expected.g_idx.unique().long()
    assert torch.equal(found.zeros[used], expected.zeros[used])
    assert (found.g_idx is None) == (expected.g_idx is None)
    assert found.g_idx is None or torch.equal(found.g_idx, expected.g_idx)


def assert_passes_at(level: str, *arguments: str) -> None:
    """Run pytest at a lower level of the CPU kernels: it is chosen once per process, and this one runs the highest."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *arguments],
        env=os.environ | {"GPTQ_BACKEND_CPU_LEVEL": level},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stdout[-3000:]
    assert "passed" in done.stdout
