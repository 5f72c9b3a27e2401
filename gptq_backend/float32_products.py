"""Float32 matrix products on a CPU by the faster of torch's two libraries.

torch multiplies float32 matrices with MKL, which uses AVX-512 only on CPUs of its own maker: on one core of an AMD EPYC
(Zen 5) it does 105 GFLOPS, and oneDNN 245. oneDNN gets them if torch is told that parts of bfloat16 are exact enough
for them. Such parts it only makes of them where a CPU has a unit for these (AMX); elsewhere it multiplies in float32
all the same. Which of the two it does is tried: the setting is used where products stay as exact as they were.
"""

from __future__ import annotations

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_SIZES = ((384, 512, 256), (16, 1536, 128), (200, 72, 600))  # of the products to try: M, K, N
_MOST = 1e-5  # error, as a share: float32 has 1e-7 to 1e-6, factors of bfloat16 have 2e-3, those of TF32 3e-4


class _Users:
    """How many run at a time, in any thread, and the setting to go back to."""

    def __init__(self) -> None:
        self.lock, self.count, self.before = threading.Lock(), 0, "none"


_users = _Users()


@contextmanager
def fast_products() -> Iterator[None]:
    """Let oneDNN multiply float32 matrices on CPUs where that is as exact; torch's setting is the same afterwards.

    Meanwhile it holds for the whole process, and torch.get_float32_matmul_precision has no answer.
    """
    if not _exact():
        yield
        return
    matmul = _settings()
    with _users.lock:
        if not _users.count:
            _users.before, matmul.fp32_precision = matmul.fp32_precision, "bf16"
        _users.count += 1
    try:
        yield
    finally:
        with _users.lock:
            _users.count -= 1
            if not _users.count:
                matmul.fp32_precision = _users.before


def _settings() -> Any:
    """Of products by oneDNN; None if torch has none (before 2.9)."""
    return getattr(torch.backends.mkldnn, "matmul", None) if torch.backends.mkldnn.is_available() else None


@functools.cache
def _exact() -> bool:
    """Whether products are of float32 with the setting, too."""
    matmul = _settings()
    if matmul is None:
        return False
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        return all(error < _MOST for size in _SIZES for error in _errors(*size))
    finally:
        matmul.fp32_precision = before


def _errors(rows: int, inner: int, columns: int) -> list[float]:
    """Against float64, as shares of the results' norms, of products of each kind that a run makes."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(size, inner, generator=generator) for size in (rows, columns))
    bias = torch.randn(columns, generator=generator)
    product = x.double() @ w.double().t()
    pairs = [
        (torch.nn.functional.linear(x, w), product),
        (torch.nn.functional.linear(x, w, bias), product + bias.double()),
        (torch.bmm(x[None], w.t()[None])[0], product),
        (x.t() @ x, x.double().t() @ x.double()),
    ]
    return [float((found - expected).norm() / expected.norm()) for found, expected in pairs]
