"""Second moments of a layer's input, and the factor that the column loop uses."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..errors import CalibrationError
from .sharing import Sharing, alone
from .tree_sum import TreeSum

_TILE = 256  # rows of a block when only the upper triangle is accumulated
_GPU_TILE = 1024  # enough work for all of its processors
_DAMP_LEVELS = 9  # each three times the one before
_NOISE = 0.5  # damping for K tokens of K channels
_INVERSE_PARTS = 8  # of the columns of a triangular inverse, to be shared out
_INVERSE_COLUMNS = 64  # that a part has at least


class Hessian:
    """Accumulates ``sum w x x^T`` over calibration tokens for one distinct input of K channels.

    The factor 2/n of the paper's H = 2 X X^T cancels in every use, so it is left out. Rows with a non-finite entry are
    dropped and counted in ``dropped``; ``tokens`` counts the rows used. Each call of :meth:`add` makes a part of its
    own, and the parts are added in the order of :class:`TreeSum`: the result is the same to the bit whoever made which
    of them.

    Args:
        channels: K.
        dtype, device: of the sums.
        first: number of the first part.

    Attributes:
        sum: the parts, each the block upper triangle as one vector.
    """

    def __init__(
        self,
        channels: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        first: int = 0,
    ) -> None:
        self.channels, self.dtype, self.device = channels, dtype, torch.device(device)
        self.sum = TreeSum(first)
        self.tokens = 0
        self.dropped = 0
        self._next = first

    @property
    def size(self) -> int:
        """Entries of a part."""
        return sum((stop - first) * (self.channels - first) for first, stop in self._block_rows())

    def add(self, x: Tensor, weights: Tensor | None = None, number: int | None = None) -> None:
        """Add a part.

        Args:
            x: float [..., K].
            weights: float [...], what each row counts, on average 1 over all calls.
            number: of the part, greater than those before; None counts on.
        """
        rows = x.detach().reshape(-1, self.channels)
        if weights is not None:
            wide = torch.float32 if rows.dtype == torch.float16 else rows.dtype  # float16 could overflow
            rows = rows.to(wide) * weights.reshape(-1, 1).sqrt().to(wide)
        if not on_tensor_cores(rows, self.dtype):
            rows = rows.to(self.device, self.dtype)
        if not rows.sum(dtype=self.dtype).isfinite():  # cheaper than a look at each entry
            finite = rows.isfinite().all(dim=1)
            self.dropped += int((~finite).sum())
            rows = rows[finite]
        number = self._next if number is None else number
        self._next = number + 1
        if len(rows):
            self.tokens += len(rows)
            self.sum.add(number, self._part(rows))

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
        found = torch.zeros((self.channels, self.channels), dtype=self.dtype, device=self.device)
        if (upper := self.sum.total()) is not None:
            for (first, stop), block in zip(self._block_rows(), self._blocks(upper)):
                square = block[:, : stop - first]
                found[first:stop, first:stop] = square.triu() + square.triu(1).t()
                found[first:stop, stop:] = block[:, stop - first :]
                found[stop:, first:stop] = block[:, stop - first :].t()
        return found

    def _part(self, rows: Tensor) -> Tensor:
        """The block upper triangle of rows^T rows; the rest follows by symmetry."""
        part = torch.empty(self.size, dtype=self.dtype, device=self.device)
        for (first, stop), block in zip(self._block_rows(), self._blocks(part)):
            multiply_wide(rows[:, first:stop].t(), rows[:, first:], self.dtype, block)
        return part

    def _block_rows(self) -> list[tuple[int, int]]:
        """(first, stop) of the rows of each block, whose columns go from first to K."""
        tile = _TILE if self.device.type == "cpu" else _GPU_TILE
        return [(first, min(first + tile, self.channels)) for first in range(0, self.channels, tile)]

    def _blocks(self, part: Tensor) -> list[Tensor]:
        """Views of a part."""
        shapes = [(stop - first, self.channels - first) for first, stop in self._block_rows()]
        return [each.view(shape) for each, shape in zip(part.split([a * b for a, b in shapes]), shapes)]


def on_tensor_cores(rows: Tensor, total: torch.dtype) -> bool:
    """Whether torch multiplies these 16-bit rows as they are, with sums in float32."""
    if not (rows.is_cuda and total == torch.float32 and rows.dtype in (torch.float16, torch.bfloat16)):
        return False
    return torch.version.hip is None and "dtype" in torch.ops.aten.mm.overloads()  # torch 2.8


def multiply_wide(left: Tensor, right: Tensor, dtype: torch.dtype, out: Tensor | None = None) -> Tensor:
    """``left @ right`` with sums in ``dtype``; factors of another one have to be such that :func:`on_tensor_cores` says
    yes.
    """
    if right.dtype == dtype:
        return torch.mm(left, right, out=out)
    product = torch.mm(left, right, out_dtype=dtype)
    return product if out is None else out.copy_(product)


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


def factor(hessian: Tensor, damp_percent: float, sharing: Sharing = alone) -> Factor:
    """U with ``U^T U = (H + damp I)^-1`` for H [K, K] without zeros on the diagonal; ``sharing`` makes the inverse.

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
            upper = _inverse(root, sharing).to(hessian.dtype)
            if upper.isfinite().all():
                method = "cholesky" if dtype == hessian.dtype else "cholesky float64"
                return Factor(upper, damp, method if damp == damp_percent else "cholesky damped more")
    diagonal = hessian.diagonal() + damp_percent * median
    return Factor(diagonal.rsqrt().diag(), damp_percent, "diagonal")


def _inverse(root: Tensor, sharing: Sharing) -> Tensor:
    """Of an upper triangle [K, K]: its first n columns are the inverse of the first n rows and columns."""
    size = len(root)
    count = min(_INVERSE_PARTS, max(1, size // _INVERSE_COLUMNS))
    edges = [size * i // count for i in range(count + 1)]

    def part(i: int) -> list[Tensor]:
        first, stop = edges[i], edges[i + 1]
        right = torch.zeros((stop, stop - first), dtype=root.dtype, device=root.device)
        right[first:].fill_diagonal_(1)
        return [torch.linalg.solve_triangular(root[:stop, :stop], right, upper=True)]

    upper = torch.zeros_like(root)
    for i, (columns,) in enumerate(sharing(count, part)):
        upper[: edges[i + 1], edges[i] : edges[i + 1]] = columns
    return upper
