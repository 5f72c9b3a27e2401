"""Second moments of a layer's input, and the factor that the column loop uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CalibrationError

_TILE = 256  # columns per block row when only the upper triangle is accumulated
_GPU_TILE = 1024  # enough work for all of its processors
_DAMP_LEVELS = 9  # each three times the one before
_NOISE = 0.5  # damping for K tokens of K channels


class Hessian:
    """Accumulates ``sum w x x^T`` over calibration tokens for one distinct input of K channels.

    The factor 2/n of the paper's H = 2 X X^T cancels in every use, so it is left out. Rows with a non-finite entry are
    dropped and counted in ``dropped``; ``tokens`` counts the rows used.
    """

    def __init__(self, channels: int, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> None:
        self._sum = torch.zeros((channels, channels), dtype=dtype, device=device)
        self.tokens = 0
        self.dropped = 0

    def add(self, x: Tensor, weights: Tensor | None = None) -> None:
        """x: float [..., K]; weights: float [...], what each row counts, on average 1 over all calls."""
        rows = x.detach().reshape(-1, self._sum.shape[0])
        if weights is not None:
            wide = torch.float32 if rows.dtype == torch.float16 else rows.dtype  # float16 could overflow
            rows = rows.to(wide) * weights.reshape(-1, 1).sqrt().to(wide)
        if not _tensor_cores(rows, self._sum):
            rows = rows.to(self._sum)
        if not rows.sum(dtype=self._sum.dtype).isfinite():  # cheaper than a look at each entry
            finite = rows.isfinite().all(dim=1)
            self.dropped += int((~finite).sum())
            rows = rows[finite]
        self.tokens += rows.shape[0]
        _accumulate(self._sum, rows)

    def matrix(self, name: str) -> Tensor:
        """[K, K], symmetric.

        Raises:
            CalibrationError: tokens were seen and all were non-finite; ``name`` is the module in the message.
        """
        if self.dropped and not self.tokens:
            raise CalibrationError(
                f"{name}: all {self.dropped} calibration tokens gave NaN or infinite inputs; the model overflows "
                "before this layer: load it in float32, or check that its weights are intact"
            )
        return self._sum.triu() + self._sum.triu(1).t()


def _tensor_cores(rows: Tensor, total: Tensor) -> bool:
    """Whether torch multiplies these 16-bit rows as they are, with sums in float32."""
    if not (rows.is_cuda and total.dtype == torch.float32 and rows.dtype in (torch.float16, torch.bfloat16)):
        return False
    return torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()  # torch 2.8


def _accumulate(total: Tensor, rows: Tensor) -> None:
    """Add rows^T rows to the block upper triangle of ``total``; the rest follows by symmetry."""
    tile = _TILE if rows.device.type == "cpu" else _GPU_TILE
    for first in range(0, rows.shape[1], tile):
        stop = first + tile
        left, right, block = rows[:, first:stop].t(), rows[:, first:], total[first:stop, first:]
        if rows.dtype == total.dtype:
            block.addmm_(left, right)
        else:  # of addmm, early versions cannot add 16-bit products to float32
            block.add_(torch.mm(left, right, out_dtype=total.dtype))


def damping(damp_percent: float, channels: int, tokens: float) -> float:
    """The share of the median of the diagonal to add to a Hessian of so many channels that so many tokens made.

    What was asked for, and more where tokens are few: a direction that they happen not to excite looks free, and errors
    moved there come back on other text (docs/benchmarks/notes.md has the figures). ``tokens`` counts rows, whatever
    their weights.
    """
    return damp_percent + _NOISE * channels / tokens


@dataclass(frozen=True)
class Factor:
    """The inverse Hessian, factored."""

    upper: Tensor  # [K, K] upper triangular U with U^T U = H^-1 (the damped H)
    damp_percent: float  # the damping that was used
    method: str  # what succeeded: "cholesky", "cholesky damped more", "cholesky float64" or "diagonal"


def factor(hessian: Tensor, damp_percent: float) -> Factor:
    """U with ``U^T U = (H + damp I)^-1`` for H [K, K] without zeros on the diagonal.

    damp is a share of the diagonal's median, not of its mean as in the paper's code: a layer that reads a massive
    activation has a mean hundreds of times its median, and so much damping leaves nothing of the other channels' H.

    Flipping both axes of H turns its lower Cholesky factor into R upper with ``H = R R^T``, hence U = R^-1: one
    factorization and one triangular inverse instead of inverse plus two factorizations. If that fails, float64 is
    tried, then there damping that triples up to 8 times, then off-diagonal terms are ignored (plain rounding,
    weighted); ``method`` tells.
    """
    median = hessian.diagonal().median()
    attempts = [(torch.float64, damp_percent * 3**i) for i in range(_DAMP_LEVELS)]
    if hessian.dtype != torch.float64:
        attempts.insert(0, (hessian.dtype, damp_percent))
    for dtype, damp in attempts:
        damped = hessian.to(dtype).clone()
        damped.diagonal().add_(damp * median)
        flipped, info = torch.linalg.cholesky_ex(damped.flip(0, 1))
        if int(info) == 0:
            root = flipped.flip(0, 1)
            eye = torch.eye(root.shape[0], dtype=dtype, device=root.device)
            upper = torch.linalg.solve_triangular(root, eye, upper=True).to(hessian.dtype)
            if upper.isfinite().all():
                method = "cholesky" if dtype == hessian.dtype else "cholesky float64"
                return Factor(upper, damp, method if damp == damp_percent else "cholesky damped more")
    diagonal = hessian.diagonal() + damp_percent * median
    return Factor(diagonal.rsqrt().diag(), damp_percent, "diagonal")
