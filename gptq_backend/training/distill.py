"""Train the scales and norms of a quantized model towards the predictions of the original; codes stay as they are.

This is the second phase of EfficientQAT (arXiv 2407.11062) with the original model as the teacher: Adam on
KL(original || quantized) over all scales and the vector parameters outside of quantized layers, such as norm weights.
The result is the same kind of checkpoint with other numbers in ``scales``.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..embedding import QuantEmbedding
from ..format.weight import QuantizedWeight
from ..linear import QuantLinear
from ..model.calibration import Batch, output_mask
from ..model.progress import Progress
from ..model.structure import evaluating
from .scales import Training, schedule, trainable, validation_batches

logger = logging.getLogger(__name__)

ROWS = 256  # positions whose distributions are in memory at once: they are larger than everything else
_SAVE_EVERY = 8  # steps between two writes of the progress
_ENTRY = "distillation"  # in the progress


@dataclass(frozen=True)
class DistillReport:
    """How a distillation went."""

    before: float  # KL divergence in nats per token on the batches that were held out
    after: float  # likewise
    losses: tuple[float, ...]  # the same on the batch of each step
    kept: bool  # whether the result was taken: after < before


@torch.enable_grad()
def distill(
    model: nn.Module,
    teacher: nn.Module,
    batches: list[Batch],
    *,
    epochs: int = 1,
    rate: float = 5e-4,
    progress: Progress | None = None,
    identity: str = "",
    on_step: Callable[[int, int, float], None] | None = None,
) -> DistillReport:
    """Distil in place. Both models are in memory, with float32 scales and the activations of one batch beside them.

    On a CPU, which emulates the products of 16-bit types, both compute in float32; the teacher ends as it was.

    Args:
        model: holds :class:`QuantLinear` layers; called as ``model(input_ids=..., attention_mask=...)``.
        teacher: the original, called likewise.
        batches: of calibration data, a step each; every eighth, or the last of fewer, is held out.
        epochs: passes over the rest.
        rate: largest relative change of a scale in one step; falls to zero along a cosine.
        progress: where an interrupted run finds what it has done; removed by whoever made it.
        identity: digest of all that made both models, for the progress.
        on_step: called with the steps done, the steps in all, and the loss.

    Raises:
        CalibrationError: fewer than two batches.
    """
    held_out, steps = [batches[i] for i in validation_batches(len(batches))], schedule(len(batches), epochs)
    progress = progress or Progress(None)
    layers = [(name, module) for name, module in model.named_modules() if isinstance(module, QuantLinear)]
    sources = {name: layer for name, layer in layers if not isinstance(layer, QuantEmbedding)}  # that one is frozen
    weights = {name: source.quantized_weight() for name, source in sources.items()}
    inside = {id(parameter) for source in sources.values() for parameter in source.parameters()}
    vectors = [p for p in model.parameters() if id(p) not in inside and p.is_floating_point() and p.dim() == 1]
    with _frozen(teacher), trainable(model, weights, vectors) as state:
        before = _mean_loss(model, teacher, held_out)
        optimizer = state.optimizer(rate)
        identity = progress.digest(identity, [steps, rate], _seen(state, weights, batches))
        entry = progress.load(_ENTRY, identity)
        earlier = () if entry is None else _restore(state, optimizer, *entry)

        def after_step(done: int, losses: list[float]) -> None:
            if on_step is not None:
                on_step(done, len(steps), losses[-1])
            if done % _SAVE_EVERY == 0:
                progress.save(_ENTRY, identity, lambda: _state(state, optimizer, losses))

        losses = state.run(steps, rate, lambda i: _backward(model, teacher, batches[i]), optimizer, earlier, after_step)
        state.round()
        after = _mean_loss(model, teacher, held_out)
        state.keep = after < before
        results = state.results()
    if state.keep:
        for name, source in sources.items():
            source.load_state_dict({"scales": results[name].scales}, strict=False)
    else:
        logger.warning("distillation did not lower the held-out divergence (%.3g -> %.3g); undone", before, after)
    return DistillReport(before, after, tuple(losses), state.keep)


def _seen(state: Training, weights: Mapping[str, QuantizedWeight], batches: list[Batch]) -> list[Tensor]:
    """What the course of a training depends on, as far as it can be seen: the data and all that is trained."""
    fields = [field for w in weights.values() for field in (w.codes, w.scales, w.zeros, w.g_idx)]
    return [*state.masters, *(tensor for batch in batches for tensor in batch.values()), *fields]


def _state(
    state: Training, optimizer: torch.optim.Optimizer, losses: list[float]
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """For :meth:`Progress.save`."""
    tensors: dict[str, Tensor] = {}
    for i, parameter in enumerate(state.parameters):
        tensors[f"{i}"] = parameter
        tensors |= {f"{i}.{key}": value for key, value in optimizer.state[parameter].items()}
    return tensors, {"losses": losses}


def _restore(
    state: Training, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor], facts: dict[str, Any]
) -> list[float]:
    """Undo :func:`_state` -> the losses."""
    for i, parameter in enumerate(state.parameters):
        parameter.data.copy_(tensors[f"{i}"])
        own = {key.partition(".")[2]: value for key, value in tensors.items() if key.startswith(f"{i}.")}
        moments = {key: value.to(parameter.device) for key, value in own.items() if value.dim()}  # all but the step
        optimizer.state[parameter] = own | moments
    state.publish()
    return list(facts["losses"])


@contextmanager
def _frozen(teacher: nn.Module) -> Iterator[None]:
    """In eval mode and, on a CPU, in float32."""
    narrow = [(p, p.dtype) for p in teacher.parameters() if p.is_floating_point() and p.device.type == "cpu"]
    with evaluating(teacher):
        try:
            for parameter, dtype in narrow:
                parameter.data = parameter.data.to(torch.promote_types(dtype, torch.float32))
            yield
        finally:
            for parameter, dtype in narrow:
                parameter.data = parameter.data.to(dtype)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """[tokens that count, V]."""
    device = next(model.parameters()).device
    output = model(**{key: value.to(device) for key, value in batch.items()})
    logits: Tensor = getattr(output, "logits", output)
    mask = output_mask(model, batch)
    return logits.flatten(0, 1) if mask is None else logits[mask.bool().to(device)]


def summed_divergence(logits: Tensor, teacher: Tensor) -> float:
    """Summed KL(teacher || model) in nats over rows [T, V], a part of them at a time."""
    parts = zip(logits.split(ROWS), teacher.split(ROWS), strict=True)
    return sum(_summed_divergence(ours, theirs).item() for ours, theirs in parts)


def _summed_divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    target, found = teacher.float().log_softmax(-1), logits.float().log_softmax(-1)
    return F.kl_div(found, target, reduction="sum", log_target=True)


def _backward(model: nn.Module, teacher: nn.Module, batch: Batch) -> float:
    """Accumulate the gradient of the summed divergence over a batch; returns the mean.

    To Adam both gradients are the same, but those of a mean are small enough to vanish in float16.
    """
    with torch.no_grad():
        target = _logits(teacher, batch)
    logits = _logits(model, batch)
    target, leaf = target.to(logits.device), logits.detach().requires_grad_()
    total = 0.0
    for ours, theirs in zip(leaf.split(ROWS), target.split(ROWS), strict=True):
        part = _summed_divergence(ours, theirs)
        part.backward()
        total += part.item()
    logits.backward(leaf.grad)
    return total / len(leaf)


@torch.no_grad()
def _mean_loss(model: nn.Module, teacher: nn.Module, batches: list[Batch]) -> float:
    total, tokens = 0.0, 0
    for batch in batches:
        found = _logits(model, batch)
        target = _logits(teacher, batch).to(found.device)
        total += summed_divergence(found, target)
        tokens += len(found)
    return total / tokens
