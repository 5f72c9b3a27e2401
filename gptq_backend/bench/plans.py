"""Which plan of the CUDA kernels is fastest on this device? Commands: ``gptq-backend tune``."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import ConfigError
from ..kernels.cuda import operators as cuda
from ..kernels.cuda import plan_tables
from ..kernels.cuda.plan import Gpu, Plan, Shape, candidates, gpu, plan
from ..kernels.interface import PreparedWeight
from . import products
from .layers import DTYPES, Problem, Weight
from .timing import Candidate, explain, interleave, quartiles

_WORTH = 0.97  # of the usual plan's time: what saves less may be noise
_ALIKE = 0.02  # of the largest result: what the plans' roundings may differ by
WRONG = "wrong results"  # the reason why a plan that runs must not serve

# Takes the plans to try -> seconds of a product by plan, and why others did not run.
Measure = Callable[[Sequence[Plan | None]], tuple[dict[Plan | None, float], dict[Plan | None, str]]]


class Choice(NamedTuple):
    """The best of all plans for some rows of x; times in seconds."""

    rows: int
    best: Plan | None
    best_seconds: float
    usual: Plan | None  # what would serve without a measurement
    usual_seconds: float | None  # None if it did not run or is WRONG
    usual_reason: str | None = None  # why it has no time


@dataclasses.dataclass(frozen=True)
class Layer:
    """Copies of a random weight on a device, prepared for the CUDA kernels."""

    problem: Problem
    copies: Sequence[PreparedWeight]

    @classmethod
    def random(cls, problem: Problem, device: torch.device) -> Layer:
        """Raises ConfigError if the kernels do not serve it there, with their reason."""
        rotation = products.ours(Weight.random(problem, device), "cuda")
        if rotation.reason:
            raise ConfigError(rotation.reason)
        return cls(problem, [copy.prepared for copy in rotation.products])  # type: ignore[attr-defined]

    @property
    def shape(self) -> Shape:
        """What its plans depend on: of the weight in memory, where codes of 5 to 7 bits have 8."""
        fields = _fields(self.copies[0])
        return Shape(fields.bits, fields.out_features, fields.qweight.shape[1])

    @property
    def device(self) -> torch.device:
        return _fields(self.copies[0]).qweight.device

    def seconds(
        self, rows: int, seconds: float, plans: Sequence[Plan | None]
    ) -> tuple[dict[Plan | None, float], dict[Plan | None, str]]:
        """Median time of a product with x [rows, K] by plan, ``seconds`` spent on each, and why others have none."""
        fields = list(map(_fields, self.copies))
        x = torch.randn((rows, self.problem.K), device=self.device).to(DTYPES[self.problem.dtype])
        failed = {how: reason for how in plans if (reason := _fault(x, fields[0], how)) is not None}
        right = [how for how in plans if how not in failed]
        tried = [Candidate(str(how), [functools.partial(_product, x, each, how) for each in fields]) for how in right]
        interleave(tried, seconds, self.device)
        failed |= {how: one.reason for how, one in zip(right, tried) if one.reason is not None}
        return {how: quartiles(one.samples)[1] for how, one in zip(right, tried) if one.reason is None}, failed


def _fault(x: Tensor, fields: cuda.WeightFields, how: Plan | None) -> str | None:
    """Why a plan must not serve, or None. Its result is compared with that through the dense weight."""
    try:
        expected = _product(x, fields, None).float()
        off = (_product(x, fields, how).float() - expected).abs().max()
    except Exception as error:
        return explain(error)
    return None if off <= _ALIKE * expected.abs().max() else WRONG


def _fields(weight: PreparedWeight) -> cuda.WeightFields:
    return cuda.WeightFields(*cuda.KERNEL.layout.arguments(weight.spec, weight.tensors))


def _product(x: Tensor, fields: cuda.WeightFields, how: Plan | None) -> Tensor:
    return cuda.planned_gemm(x, fields, None, how)


def choose(rows: int, shape: Shape, on: Gpu, measure: Measure) -> Choice:
    """The fastest plan; the usual one stays where nothing is clearly faster.

    Raises:
        ConfigError: none ran.
    """
    usual = plan(rows, shape.out_features, shape.tiles, shape.bits, on)
    tried = dict.fromkeys([usual, *candidates(rows, shape.tiles, shape.bits, on.shared_bytes)])
    times, failed = measure(list(tried))
    if not times:
        first = next(iter(failed.values()))
        raise ConfigError(
            f"no plan of the CUDA kernels ran for {rows} rows of a {shape.bits}-bit layer ({first}); "
            "gptq-backend doctor says more"
        )
    best = min(times, key=lambda how: times[how])
    if usual in times and times[best] > _WORTH * times[usual]:
        best = usual
    return Choice(rows, best, times[best], usual, times.get(usual), failed.get(usual))


def tune(layer: Layer, rows: Sequence[int], seconds: float) -> Iterator[Choice]:
    """Measure each number of ``rows``, and keep what was best for all later processes of this user.

    seconds: spent on each plan, of which there are some thirty.

    Raises:
        ConfigError: no plan runs.
        OSError: the table cannot be read or written.
    """
    for count in rows:
        choice = choose(count, layer.shape, gpu(layer.device), functools.partial(layer.seconds, count, seconds))
        plan_tables.write({layer.shape: {count: choice.best}}, plan_tables.Kind.of(layer.device))
        plan_tables.forget()
        yield choice


def table_path(device: torch.device) -> Path:
    """Where the table for this kind of device is kept for this user."""
    return plan_tables.Kind.of(device).path
