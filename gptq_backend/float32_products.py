"""Float32 matrix products on a CPU by the faster of torch's two libraries.

torch multiplies float32 matrices with MKL, which uses AVX-512 only on CPUs of its own maker: on one core of an AMD EPYC
(Zen 5) it does 105 GFLOPS, and oneDNN 245. oneDNN gets them if torch is told that parts of bfloat16 are exact enough
for them. Such parts it only makes of them where a CPU has a unit for these (AMX); elsewhere it multiplies in float32
all the same. Which of the two it does is tried: the setting is used where products stay as exact as they were.
"""

from __future__ import annotations

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
        self.lock, self.count, self.before = threading.Lock(), 0, ""
        self.exact: bool | None = None  # what was found when it was tried


_users = _Users()


@contextmanager
def fast_products() -> Iterator[None]:
    """Let oneDNN multiply float32 matrices on CPUs where that is as exact; torch's setting is the same afterwards.

    Meanwhile it holds for the whole process, and torch.get_float32_matmul_precision has no answer. A setting that
    somebody changes meanwhile stays as it was changed.
    """
    begun = _begin()
    try:
        yield
    finally:
        if begun:
            _end()


def _begin() -> bool:
    """Whether the setting was made, by this or another user."""
    matmul = _settings()
    if matmul is None:
        return False
    with _users.lock:  # also while it is tried: others would take what is set meanwhile for the user's own
        if not _users.count:
            before = _own_setting(matmul)
            if _users.exact is None:
                try:
                    _users.exact = _is_exact(matmul)
                finally:
                    matmul.fp32_precision = before
            if not _users.exact:
                return False
            _users.before, matmul.fp32_precision = before, "bf16"
        _users.count += 1
    return True


def _end() -> None:
    matmul = _settings()
    with _users.lock:
        _users.count -= 1
        if not _users.count and matmul is not None and matmul.fp32_precision == "bf16":
            matmul.fp32_precision = _users.before


def _settings() -> Any:
    """Of products by oneDNN; None if torch has none (before 2.9), or none is used."""
    backend = torch.backends.mkldnn
    return getattr(backend, "matmul", None) if backend.is_available() and backend.enabled else None


def _own_setting(matmul: Any) -> str:
    """That of products, or "none" where they follow the one for all of oneDNN, which is what is read then."""
    setting: str = matmul.fp32_precision
    return "none" if setting == torch.backends.mkldnn.fp32_precision else setting


def _is_exact(matmul: Any) -> bool:
    """Whether products are of float32 with the setting, too. It is left as it is for the trial."""
    matmul.fp32_precision = "bf16"
    return all(error < _MOST for size in _SIZES for error in _errors(*size))


def _errors(rows: int, inner: int, columns: int) -> list[float]:
    """Against float64, as shares of the results' norms, of products of each kind that a run makes."""
    generator = torch.Generator().manual_seed(0)
    own: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}  # whatever the user's defaults are
    with torch.no_grad(), torch.autocast("cpu", enabled=False):
        x, w = (torch.randn(size, inner, generator=generator, **own) for size in (rows, columns))
        bias = torch.randn(columns, generator=generator, **own)
        product = x.double() @ w.double().t()
        pairs = [
            (torch.nn.functional.linear(x, w), product),
            (torch.nn.functional.linear(x, w, bias), product + bias.double()),
            (torch.bmm(x[None], w.t()[None])[0], product),
            (x.t() @ x, x.double().t() @ x.double()),
        ]
        return [float((found - expected).norm() / expected.norm()) for found, expected in pairs]
