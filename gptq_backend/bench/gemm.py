"""One quantized layer's product: our kernels, what torch has, and peers from outside, against the hardware's roof."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..kernels.table import KERNELS, select_kernel
from . import products
from .layers import DTYPES, Problem, Weight
from .products import Peer, Product, Rotation
from .timing import Candidate, explain, interleave, quartiles

_CHECKED = 64  # rows and columns of the output that are compared with float64


@dataclass(frozen=True)
class Row:
    """One kernel on one problem; the figures after ``error`` are missing when there is a ``reason``."""

    kernel: str  # row of the kernel table, "F.linear", "aten int4pack", a peer, "reading alone", "reading in a layer"
    N: int  # y[M, N] = x[M, K] @ W[N, K].T
    K: int
    M: int
    bits: int  # this and the next: see Problem
    group_size: int
    sym: bool
    act_order: bool
    dtype: str
    copies: int  # of the weight, which the calls go through in turn
    rotated_bytes: int  # of all copies
    error: float | None = None  # norm-relative distance from float64, on a sample of the outputs
    us: float | None = None  # median time of a call
    spread: tuple[float, float] | None = None  # first and third quartile of it
    timed_calls: int = 0  # how many calls are behind it
    gbps: float | None = None  # what has to be read (codes, 16-bit scales; F.linear: the dense weight) over ``us``
    roof_us: float | None = None  # the longer of reading that at full bandwidth, and 2*M*N*K operations at the peak
    roof_share: float | None = None  # roof_us / us
    ratio_bf16: float | None = None  # speed in units of F.linear's, which runs in ``dtype``
    ratios: dict[str, float] = field(default_factory=dict)  # speed in units of each other kernel's
    reason: str | None = None  # why there are no times


def check_backends(backends: Sequence[str]) -> None:
    """Raises ConfigError for what no row of the kernel table is called."""
    names = [kernel.name for kernel in KERNELS]
    for backend in backends:
        if backend not in names:
            raise ConfigError(f"backend={backend!r} is not a kernel; choose one of {names}")


def run(
    problem: Problem,
    tokens: Sequence[int],
    ceilings: dict[str, Any],
    device: torch.device,
    backends: Sequence[str] = (),
    peers: Sequence[Peer] = (),
    seconds: float = 1.0,
    copies: int | None = None,
) -> Iterator[list[Row]]:
    """For each M of ``tokens`` the rows of one problem: our kernels, torch's, the peers.

    Args:
        ceilings: see ``machine.measure_ceilings``.
        backends: rows of the kernel table; none of them means the one that auto selects.
        seconds: time per row.
        copies: of each weight; None for as many as no cache holds.
    """
    weight = Weight.random(problem, device, copies)
    rotations = [
        *(products.ours(weight, backend) for backend in backends or [select_kernel(problem.spec, device).name]),
        *(products.reading(weight) if device.type == "cpu" else []),
        products.dense(weight),
        products.aten(weight),
        *(products.peer(weight, foreign) for foreign in peers),
    ]
    for count in tokens:
        x = torch.randn((count, problem.K), device=device).to(DTYPES[problem.dtype])
        yield _measure(weight, rotations, x, ceilings, seconds)


def _measure(
    weight: Weight, rotations: Sequence[Rotation], x: Tensor, ceilings: dict[str, Any], seconds: float
) -> list[Row]:
    """One row per kernel for x [M, K]."""
    candidates, errors = [], []
    for rotation in rotations:
        calls = [functools.partial(product, x) for product in rotation.products]
        candidate, error = Candidate(rotation.name, calls, reason=rotation.reason), None
        if candidate.reason is None and rotation.computes:
            try:
                error = _error(weight, x, rotation.products[0])
            except Exception as raised:
                candidate.reason = explain(raised)
        candidates.append(candidate)
        errors.append(error)
    interleave([candidate for candidate in candidates if candidate.reason is None], seconds, x.device)
    medians = {one.name: quartiles(one.samples)[1] for one in candidates if one.reason is None}
    rows = []
    for rotation, candidate, error in zip(rotations, candidates, errors):
        row: dict[str, Any] = {"kernel": rotation.name, "M": x.shape[0], **asdict(weight.problem), "error": error}
        row |= {"copies": len(rotation.products), "rotated_bytes": len(rotation.products) * rotation.nbytes}
        if candidate.reason is None:
            operations = 2 * x.shape[0] * weight.problem.N * weight.problem.K if rotation.computes else 0
            row |= _figures(candidate, rotation.nbytes, operations, ceilings)
            row["ratios"] = {name: other * 1e6 / row["us"] for name, other in medians.items() if name != rotation.name}
            row["ratio_bf16"] = medians["F.linear"] * 1e6 / row["us"] if "F.linear" in medians else None
        rows.append(Row(**row, reason=candidate.reason))
    return rows


def _figures(candidate: Candidate, nbytes: int, operations: int, ceilings: dict[str, Any]) -> dict[str, Any]:
    first, median, third = quartiles(candidate.samples)
    roof = max(nbytes / ceilings["read_gbps"], operations / ceilings["peak_gflops"]) / 1e9
    return {
        "us": median * 1e6,
        "spread": (first * 1e6, third * 1e6),
        "timed_calls": candidate.timed_calls,
        "gbps": nbytes / median / 1e9,
        "roof_us": roof * 1e6,
        "roof_share": roof / median,
    }


@torch.no_grad()
def _error(weight: Weight, x: Tensor, product: Product) -> float:
    """Norm-relative distance from float64 of a sample of the outputs, the first and last among them."""
    y = product(x)
    shape = (x.shape[0], weight.problem.N)
    if not isinstance(y, Tensor) or tuple(y.shape) != shape:
        raise ValueError(f"returned {tuple(y.shape) if isinstance(y, Tensor) else type(y)}, expected a tensor {shape}")
    rows, columns = (torch.linspace(0, size - 1, min(size, _CHECKED)).round().long().to(x.device) for size in shape)
    expected = x[rows].double() @ weight.columns(columns).dequantize(torch.float64).t()
    return float((y[rows][:, columns].double() - expected).norm() / expected.norm())


def call_overhead(
    device: torch.device, dtype: str = "bf16", backend: str | None = None, seconds: float = 0.2
) -> dict[str, float]:
    """Microseconds of a call on a layer so small (16x16) that its arithmetic costs nothing.

    The layer's own share is the difference between ``QuantLinear`` and its kernel; ``nn.Linear`` is the measure.
    """
    weight = Weight.random(Problem(N=16, K=16, group_size=16, dtype=dtype), device)
    layer = products.layer(weight, backend)
    weight_alone = layer.prepared
    assert weight_alone is not None
    plain = nn.Linear(16, 16, bias=False, device=device, dtype=DTYPES[dtype])
    x = torch.randn((1, 16), device=device).to(DTYPES[dtype])
    candidates = [
        Candidate("QuantLinear", [functools.partial(layer, x)]),
        Candidate(f"kernel {weight_alone.kernel.name}", [functools.partial(weight_alone.multiply, x)]),
        Candidate("nn.Linear", [functools.partial(plain, x)]),
    ]
    interleave(candidates, seconds, device, launching=True)
    return {candidate.name: quartiles(candidate.samples)[1] * 1e6 for candidate in candidates}
