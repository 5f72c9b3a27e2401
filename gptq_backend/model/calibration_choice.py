"""Choose calibration samples whose activations stand for those of a larger pool.

A quantizer that shapes its rounding noise by second moments A of a layer's input, as GPTQ does, leaves on inputs with
second moments H an error of about ``det(A)^(1/D) * tr(A^-1 H) / D``, least where A is a multiple of H. That predicted
error on the pool is what the choice minimizes; it does not change when the inputs are transformed linearly, so sketches
of few dimensions serve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import CalibrationError
from . import lockstep
from .calibration import Batch, call_model, check_fits, make_batches, model_inputs
from .placement import Placement, outside_of, tensors_of
from .structure import BlockNames, evaluating, find_blocks

_WIDTH = 64  # dimensions of a sketch
_DEPTHS = (0.125, 0.25, 0.375, 0.5)  # of the blocks whose inputs are sketched, as a share of all blocks
_RIDGE = 0.05  # damping of the sketches; 0.3 gave the same within the noise (docs/benchmarks/notes.md)
_GAP = 0.05  # of held-out over training error, at which there are enough samples
_GAIN = 0.02  # of held-out error, less than which a doubling must bring to end the choice

OnBlock = Callable[[nn.Module], object]


@dataclass(frozen=True)
class Point:
    """Predicted errors of a set of ``samples``, on itself and on held-out samples of the same sources.

    The unit is the error of a fit to the whole pool.
    """

    samples: int
    training: float
    held_out: float


@dataclass(frozen=True)
class Selection:
    """What :func:`select` chose, and why it ended."""

    chosen: tuple[int, ...]  # indices into the pool, in the order of choice
    curve: tuple[Point, ...]  # one after each choice
    reason: str  # "gap", "doubling", "samples" (as many as allowed) or "pool" (nothing left)

    @property
    def why(self) -> str:
        """The reason as a sentence."""
        limit = "as many as were allowed" if self.reason == "samples" else "the pool has no more"
        if math.isnan(self.curve[-1].held_out):
            return limit
        excess = _excess(self.curve, len(self.curve))
        gap = f"the error predicted on held-out windows is {100 * excess:.1f} % above that on the chosen ones"
        if self.reason == "gap":
            return f"{gap}, and {100 * _GAP:.0f} % are close enough"
        if self.reason == "doubling":
            gain = 1 - (1 + excess) / (1 + _excess(self.curve, len(self.curve) // 2))
            return f"the last doubling lowered the error predicted on held-out windows by {100 * gain:.1f} %; {gap}"
        return f"{limit}; {gap}"


def sketch(
    model: nn.Module,
    samples: Sequence[Any] | Tensor,
    *,
    seed: int = 0,
    block_name: BlockNames = None,
    on_block: OnBlock = lambda block: None,
    on_done: OnBlock = lambda block: None,
    device: torch.device | str | None = None,
) -> Tensor:
    """Second moments of the inputs of a few blocks in the first half of ``model``, after a random projection.

    Every token is scaled to norm 1 first: a few have norms thousands of times those of the others. All samples pass a
    block before any enters the next, so that one block at a time needs its weights.

    Args:
        model: unchanged afterwards.
        samples: N of equal shapes, see :func:`calibration.make_batches`: token ids int64 [T], or mappings.
        seed: of the projection.
        block_name: names of the lists of blocks, where :func:`structure.find_blocks` would choose another.
        on_block, on_done: called with each block before it is used, and when nothing reads it any more.
        device: where to compute; None means where the weights are.

    Returns:
        float32 [N, P, D, D] on the CPU: the mean over tokens of ``y y^T`` for P blocks; D is 64, or the model's width
        if that is less.

    Raises:
        CalibrationError: token ids or lengths that the model does not take. ConfigError: no repeated blocks.
    """
    batches = make_batches(samples)
    check_fits(model, batches)
    blocks = list(find_blocks(model, block_name).values())
    return _Sketcher(model, blocks, seed, on_block, on_done, Placement(device)).run(batches)


class _Sketcher:
    def __init__(
        self,
        model: nn.Module,
        blocks: list[nn.Module],
        seed: int,
        on_block: OnBlock,
        on_done: OnBlock,
        placement: Placement,
    ) -> None:
        self.model, self.seed, self.placement = model, seed, placement
        self.on_block, self.on_done = on_block, on_done
        probes = sorted({int(len(blocks) * depth) for depth in _DEPTHS})
        self.blocks = blocks[: probes[-1] + 1]
        self.found: dict[int, list[Tensor]] = {i: [] for i in probes}  # by block, a tensor per batch, in their order
        self.outside = outside_of(blocks, model)
        self.current: nn.Module | None = None
        self.begun = False  # a block was reached

    def run(self, batches: list[Batch]) -> Tensor:
        inputs = [model_inputs(self.model, batch, self.placement.device) for batch in batches]
        tasks = [partial(call_model, self.model, each, lambda: self.begun) for each in inputs]
        with ExitStack() as stack:
            for i, block in enumerate(self.blocks):
                stack.callback(block.register_forward_pre_hook(self.hook(i), with_kwargs=True).remove)
            stack.callback(self.placement.send_back, self.outside)
            self.placement.bring(self.outside)
            with torch.no_grad(), evaluating(self.model):
                lockstep.run(tasks, self.begin_block, int)
            self.finish_block()
        return torch.stack([torch.cat(moments) for moments in self.found.values()], dim=1)

    def hook(self, number: int) -> Callable[..., None]:
        def wait(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            self.begun = True
            if number in self.found:
                self.found[number].append(self.moments(next(iter((*args, *kwargs.values())))))
            if number == len(self.blocks) - 1:
                raise lockstep.Stop
            lockstep.wait(number)

        return wait

    def begin_block(self, number: int) -> None:
        self.finish_block()
        self.current = self.blocks[number]
        self.on_block(self.current)
        self.placement.bring(tensors_of(self.current))

    def finish_block(self) -> None:
        if self.current is None:
            return
        self.placement.send_back(tensors_of(self.current))
        self.on_done(self.current)
        self.current = None

    def moments(self, x: Tensor) -> Tensor:
        """x: [B, T, K] -> [B, D, D]; tokens with NaN or infinite activations count as zero."""
        x = x.detach().float()
        x = x.nan_to_num(0.0, 0.0, 0.0) * x.isfinite().all(-1, keepdim=True)
        y = nn.functional.normalize(x, dim=-1)
        if x.shape[-1] > _WIDTH:
            generator = torch.Generator().manual_seed(self.seed)
            y = y @ torch.randn(x.shape[-1], _WIDTH, generator=generator).to(y)
        return (y.mT @ y / y.shape[-2]).cpu()


def select(
    moments: Tensor,
    sources: Sequence[str],
    weights: Mapping[str, float],
    samples: int,
    *,
    held_out: Sequence[int] = (),
    channels: int | None = None,
    tokens: int = 1,
    least: int = 1,
) -> Selection:
    """Greedily choose samples that together predict the least error, on average over sources of its logarithm.

    Every source is taken from once before any is again. Ties go to the earlier sample, so the choice is deterministic.
    It ends when the error predicted on held-out samples is within 5 % of that on the chosen ones of the same sources,
    or when the last doubling lowered it by less than 2 %; the excess is averaged over a doubling, because single
    choices make it jump. It is measured in the D dimensions of the sketch. What a fit to n independent tokens would
    have, 2 D / n, is scaled by channels / D, as it grows with the dimensions that are fitted; the rest is text that
    differs, and counts as it is.

    Args:
        moments: [N, P, D, D], see :func:`sketch`.
        sources: where each of the N samples comes from.
        weights: how much each source counts.
        samples: choose at most this many.
        held_out: indices of samples that validate the choice and are not chosen; empty: nothing ends it early.
        channels: input channels of the layers; None for D.
        tokens: of each sample.
        least: choose at least this many, if ``samples`` and the pool allow it.

    Raises:
        CalibrationError: nothing to choose from, or ``samples`` below 1.
    """
    kept = set(held_out)
    candidates = [i for i in range(len(sources)) if i not in kept]
    if not candidates or samples < 1:
        raise CalibrationError(
            f"{len(candidates)} samples to choose from and samples={samples}; expected at least 1 of each"
        )
    moments = moments.double()
    target, share = _by_source(moments, sources, weights, candidates)
    moments, target = _whiten(moments, torch.einsum("s,spde->pde", share, target), target)
    scale = max(1.0, (channels or 0) / moments.shape[-1])
    total = torch.zeros_like(moments[0])
    chosen: list[int] = []
    curve: list[Point] = []
    validation = sorted(kept)
    while True:
        taken = {sources[i] for i in chosen}
        eligible = [i for i in candidates if sources[i] not in taken] or candidates
        errors = _log_error((total + moments[eligible]) / (len(chosen) + 1), target, share)
        chosen.append(eligible[int(errors.argmin())])
        candidates.remove(chosen[-1])
        total = total + moments[chosen[-1]]
        noise = 2 * moments.shape[-1] / (tokens * len(chosen))
        curve.append(_point(moments, sources, weights, chosen, validation, noise, scale))
        reason = _reason(curve, samples, len(candidates), least)
        if reason is not None:
            return Selection(tuple(chosen), tuple(curve), reason)


def _by_source(
    moments: Tensor, sources: Sequence[str], weights: Mapping[str, float], members: Sequence[int]
) -> tuple[Tensor, Tensor]:
    """Mean moments [S, P, D, D] of the sources among ``members``, and their weights [S], which sum to 1."""
    names = sorted({sources[i] for i in members})
    means = torch.stack([moments[[i for i in members if sources[i] == name]].mean(0) for name in names])
    share = torch.tensor([weights[name] for name in names], dtype=moments.dtype)
    return means, share / share.sum()


def _whiten(moments: Tensor, pool: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """``moments`` and ``target`` in the coordinates in which ``pool`` [P, D, D] is the identity."""
    values, vectors = torch.linalg.eigh(pool)
    useful = values > 1e-6 * values[:, -1:]  # what float32 moments of the pool have in the others is rounding
    root = vectors * torch.where(useful, values.clamp_min(1e-300).rsqrt(), 0.0)[:, None]
    return root.mT @ moments @ root, root.mT @ target @ root


def _log_error(fitted: Tensor, target: Tensor, share: Tensor) -> Tensor:
    """Predicted log error [C] of fits [C, P, D, D] on targets [S, P, D, D], averaged over sources and blocks."""
    log_det, inverse = _fit(fitted)
    # c: candidate, p: block, s: source, d and e: dimensions of a sketch
    traces = torch.einsum("cpde,spde->cps", inverse, target) / fitted.shape[-1]
    return (log_det + traces.log() @ share).mean(-1)


def _fit(fitted: Tensor) -> tuple[Tensor, Tensor]:
    """Damped: the logarithm of ``det(A)^(1/D)`` [...], and the inverse [..., D, D]."""
    width = fitted.shape[-1]
    factor = torch.linalg.cholesky(fitted + _RIDGE * torch.eye(width, dtype=fitted.dtype))
    return 2 * factor.diagonal(dim1=-2, dim2=-1).log().sum(-1) / width, torch.cholesky_inverse(factor)


def _point(
    moments: Tensor,
    sources: Sequence[str],
    weights: Mapping[str, float],
    chosen: list[int],
    validation: list[int],
    noise: float,
    scale: float,
) -> Point:
    """Errors of a fit to the chosen samples, on those and on the validation samples of the same sources.

    ``scale`` multiplies the excess of the latter up to ``noise``, that of a fit to as many independent tokens.
    """
    log_det, inverse = _fit(moments[chosen].mean(0))

    def error(members: list[int]) -> float:
        mean, share = _by_source(moments, sources, weights, members)  # sources weigh the same in chosen and validation
        traces = torch.einsum("pde,spde,s->p", inverse, mean, share) / inverse.shape[-1]
        return float((log_det.exp() * traces).mean())

    training = error(chosen)
    both = {sources[i] for i in chosen} & {sources[i] for i in validation}
    if not both:
        return Point(len(chosen), training, math.nan)
    excess = error([i for i in validation if sources[i] in both]) / error([i for i in chosen if sources[i] in both]) - 1
    excess += (scale - 1) * min(excess, noise)
    return Point(len(chosen), training, training * (1 + excess))


def _excess(curve: Sequence[Point], samples: int) -> float:
    """Of the held-out over the training error, averaged over the doubling that ends with so many samples."""
    points = curve[samples // 2 : samples]
    return sum(point.held_out / point.training - 1 for point in points) / len(points)


def _reason(curve: list[Point], samples: int, left: int, least: int) -> str | None:
    """Why to stop after the last point; None to go on."""
    count = len(curve)
    if count >= samples:
        return "samples"
    if not left:
        return "pool"
    excess = _excess(curve, count)
    if count < least or math.isnan(excess):
        return None
    if excess <= _GAP:
        return "gap"
    if count // 4 >= least and 1 + excess > (1 - _GAIN) * (1 + _excess(curve, count // 2)):
        return "doubling"
    return None
