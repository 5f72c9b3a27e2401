"""Train the scales and norms of a quantized model towards the predictions of the original; codes stay as they are.

This is the second phase of EfficientQAT (arXiv 2407.11062) with the original model as the teacher: Adam on
KL(original || quantized) over all scales and the vector parameters outside of quantized layers, such as norm weights.
The result is the same kind of checkpoint with other numbers in ``scales``.
"""

from __future__ import annotations

import dataclasses
import hashlib
import logging
import math
import os
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .calibration import Batch, make_batches
from .errors import CalibrationError, ConfigError
from .linear import QuantLinear
from .structure import evaluating, replace_module
from .weight import QuantizedWeight

logger = logging.getLogger(__name__)

_HELD_OUT = 8  # one batch in so many judges the result
_ROWS = 512  # positions whose distributions are compared at once
_SAVE_EVERY = 8  # steps between two writes of the progress
_LEAST_FACTOR = 0.1  # of a scale; none changes its sign
_STATE = {"changes", "optimizer", "digest", "losses"}  # what is in a file of progress


@dataclass(frozen=True)
class DistillReport:
    """How a distillation went.

    Args:
        before, after: KL divergence in nats per token on the batches that were held out.
        losses: the same on the batch of each step.
        kept: whether the result was taken: ``after < before``.
    """

    before: float
    after: float
    losses: tuple[float, ...]
    kept: bool


@torch.enable_grad()
def distill(
    model: nn.Module,
    teacher: nn.Module,
    calibration: Sequence[Any],
    *,
    epochs: int = 1,
    rate: float = 5e-4,
    batch_size: int | None = None,
    progress_file: str | Path | None = None,
    on_step: Callable[[int, int, float], None] | None = None,
) -> DistillReport:
    """Distil in place. Both models are in memory, with float32 scales and the activations of one batch beside them.

    On a CPU, which emulates the products of 16-bit types, both compute in float32; the teacher ends as it was.

    Args:
        model: holds :class:`QuantLinear` layers; called as ``model(input_ids=..., attention_mask=...)``.
        teacher: the original, called likewise.
        calibration: token id samples (see :func:`calibration.make_batches`); every eighth batch, or the last
            of fewer, is held out.
        epochs: passes over the rest.
        rate: largest relative change of a scale in one step; falls to zero along a cosine.
        batch_size: sequences per step; None aims at about 2048 tokens.
        progress_file: written now and then, read if it exists, so that an interrupted run goes on; removed at the end.
            One of another run (model, data, settings) is overwritten, with a warning; any other file is refused.
        on_step: called with the steps done, the steps in all, and the loss.

    Raises:
        CalibrationError: fewer than two batches.
        ConfigError: ``progress_file`` is something else than the progress of a distillation.
    """
    batches, held_out = hold_out(make_batches(calibration, batch_size))
    check_progress_file(progress_file)
    order = torch.Generator().manual_seed(0)
    schedule = [int(i) for _ in range(epochs) for i in torch.randperm(len(batches), generator=order)]
    with _frozen(teacher), _trainable(model) as trained:
        before = _mean_loss(model, teacher, held_out)
        optimizer = trained.optimizer(rate)
        digest = "" if progress_file is None else trained.digest(batches, schedule, rate)
        losses = _resume(progress_file, trained.parameters, optimizer, digest)
        for step in range(len(losses), len(schedule)):
            warm_up = min(1.0, (step + 1) / max(1, len(schedule) // 20))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["size"] * warm_up * 0.5 * (1 + math.cos(math.pi * step / len(schedule)))
            optimizer.zero_grad()
            losses.append(_backward(model, teacher, batches[schedule[step]]))
            optimizer.step()
            trained.clamp()
            if on_step is not None:
                on_step(step + 1, len(schedule), losses[-1])
            if (step + 1) % _SAVE_EVERY == 0:
                _save(progress_file, trained.parameters, optimizer, digest, losses)
        trained.round()
        after = _mean_loss(model, teacher, held_out)
        trained.keep = after < before
    if progress_file is not None:
        for leftover in (Path(progress_file), _partial(progress_file)):
            leftover.unlink(missing_ok=True)
    if not trained.keep:
        logger.warning("distillation did not lower the held-out divergence (%.4f -> %.4f); undone", before, after)
    return DistillReport(before, after, tuple(losses), trained.keep)


def check_progress_file(path: str | Path | None) -> None:
    """Raises ConfigError where a directory is in the way, or a file that no distillation wrote: it would be lost."""
    if path is None or not Path(path).exists():
        return
    if Path(path).is_dir():
        raise ConfigError(f"{path} is a directory, where the progress of the distillation would be kept; move it away")
    try:
        _read(path, mmap=True)
    except OSError as error:
        raise ConfigError(f"{path} cannot be read ({error.strerror}), to go on from there; move it away") from None
    except (EOFError, RuntimeError, ValueError, LookupError, pickle.UnpicklingError):
        raise ConfigError(
            f"{path} is not the progress of a distillation, which would be kept there and then removed; move it away"
        ) from None


def hold_out(batches: list[Batch]) -> tuple[list[Batch], list[Batch]]:
    """The batches to train on and those that judge: spread evenly, because :func:`make_batches` sorts by length.

    Raises:
        CalibrationError: fewer than two batches.
    """
    if len(batches) < 2:
        raise CalibrationError(
            "one batch of calibration data, of which distillation holds one out; pass more samples or a smaller "
            "batch_size, or set distill_epochs=0"
        )
    judges = range(_HELD_OUT - 1, len(batches), _HELD_OUT) or range(len(batches) - 1, len(batches))
    return [batch for i, batch in enumerate(batches) if i not in judges], [batches[i] for i in judges]


class _Dequantize(torch.autograd.Function):
    """[N, K] weight from scales [N, G] and fixed codes; keeps no dense copy for the backward pass."""

    @staticmethod
    def forward(ctx: Any, scales: Tensor, centred: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(centred, index)
        ctx.groups = scales.shape[1]
        return scales[:, index].mul_(centred)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        centred, index = ctx.saved_tensors
        out = grad.new_zeros(grad.shape[0], ctx.groups)
        return out.index_add_(1, index, grad * centred), None, None


class _Trained(nn.Module):
    """A linear layer with the codes of a QuantLinear and a relative change of its scales."""

    def __init__(self, source: QuantLinear) -> None:
        super().__init__()
        quantized = source.quantized_weight()
        index = quantized.g_idx.long()
        centred = quantized.codes.to(torch.int16) - quantized.zeros.to(torch.int16)[index]  # 9 bits with sign
        self.quantized, self.bias = quantized, source.bias
        self.centred: Tensor
        self.index: Tensor
        self.scales: Tensor
        self.register_buffer("centred", centred.t().contiguous(), persistent=False)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("scales", quantized.scales.t().float().contiguous(), persistent=False)
        self.change = nn.Parameter(torch.zeros_like(self.scales))

    def forward(self, x: Tensor) -> Tensor:
        weight = _Dequantize.apply(self.scales * (1 + self.change), self.centred, self.index)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, weight.to(x.dtype), bias)

    def result(self) -> QuantizedWeight:
        scales = (self.scales * (1 + self.change.detach())).to(self.quantized.scales.dtype)
        return dataclasses.replace(self.quantized, scales=scales.t().contiguous())

    def quantized_linear(self, source: QuantLinear) -> QuantLinear:
        """A layer like ``source`` with the trained scales."""
        spec = source.stored_spec
        checkpoint_format = "gptq_p" if spec.planar else "gptq" if spec.zero_offset else "gptq_v2"
        return QuantLinear.from_weight(
            self.result(), source.bias, checkpoint_format, spec.word_dtype, source.name, source.backend
        )

    def round(self) -> None:
        """To what will be stored."""
        self.scales = self.result().scales.t().to(self.scales).contiguous()
        self.change.data.zero_()


class _Training:
    """The model made trainable: quantized layers swapped for :class:`_Trained`, floats in float32 on a CPU."""

    def __init__(self, model: nn.Module) -> None:
        self.model, self.keep = model, False
        self.sources = {name: module for name, module in model.named_modules() if isinstance(module, QuantLinear)}
        inside = {id(parameter) for module in self.sources.values() for parameter in module.parameters()}
        self.dense = [p for p in model.parameters() if id(p) not in inside and p.is_floating_point()]
        self.before = [(p.dtype, p.requires_grad, p.data if p.dim() == 1 else None) for p in self.dense]
        for parameter in self.dense:
            parameter.requires_grad_(parameter.dim() == 1)
            if parameter.device.type == "cpu" or parameter.dim() == 1:
                parameter.data = parameter.data.to(torch.promote_types(parameter.dtype, torch.float32))
        self.vectors = [parameter for parameter in self.dense if parameter.dim() == 1]
        # Fresh storage, so that training leaves what ``before`` holds alone.
        for vector in self.vectors:
            vector.data = vector.data.clone()
        self.layers = {name: _Trained(source) for name, source in self.sources.items()}
        for name, layer in self.layers.items():
            replace_module(model, name, layer)

    @property
    def parameters(self) -> list[nn.Parameter]:
        return [layer.change for layer in self.layers.values()] + self.vectors

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        """Adam that changes every parameter by at most about ``rate`` of its size in one step."""
        groups: list[dict[str, Any]] = [{"params": [layer.change for layer in self.layers.values()], "size": 1.0}]
        groups += [{"params": [vector], "size": float(vector.detach().abs().mean()) or 1.0} for vector in self.vectors]
        return torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.95))

    def clamp(self) -> None:
        """Keep every scale's sign."""
        for layer in self.layers.values():
            layer.change.data.clamp_(min=_LEAST_FACTOR - 1)

    def digest(self, batches: list[Batch], schedule: list[int], rate: float) -> str:
        """Of all that the course of a training depends on, but for the teacher."""
        found = hashlib.sha256(repr((schedule, rate)).encode())
        tensors = [*self.vectors, *(tensor for batch in batches for tensor in batch.values())]
        for layer in self.layers.values():
            stored = layer.quantized
            tensors += [stored.codes, stored.scales, stored.zeros, stored.g_idx]
        for tensor in tensors:
            found.update(repr((tensor.dtype, tuple(tensor.shape))).encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        return found.hexdigest()

    def round(self) -> None:
        """Everything to what will be stored."""
        for layer in self.layers.values():
            layer.round()
        for parameter, (dtype, _, _) in zip(self.dense, self.before, strict=True):
            parameter.data = parameter.data.to(dtype).to(parameter.dtype)

    def end(self) -> None:
        """Put quantized layers back: with the result if ``keep`` is set, else as they were."""
        for name, source in self.sources.items():
            replace_module(self.model, name, self.layers[name].quantized_linear(source) if self.keep else source)
        for parameter, (dtype, required, vector) in zip(self.dense, self.before, strict=True):
            parameter.data = parameter.data.to(dtype) if vector is None or self.keep else vector
            parameter.requires_grad_(required)
            parameter.grad = None


@contextmanager
def _trainable(model: nn.Module) -> Iterator[_Training]:
    with evaluating(model):
        state = _Training(model)
        try:
            yield state
        finally:
            state.end()


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
    mask = batch.get("attention_mask")
    return logits.flatten(0, 1) if mask is None else logits[mask.bool().to(device)]


def _divergence(logits: Tensor, teacher: Tensor) -> Tensor:
    """Summed KL(teacher || model) over rows [T, V]."""
    target, found = teacher.float().log_softmax(-1), logits.float().log_softmax(-1)
    return F.kl_div(found, target, reduction="sum", log_target=True)


def _backward(model: nn.Module, teacher: nn.Module, batch: Batch) -> float:
    """Accumulate the gradient of the mean divergence over a batch; returns that mean."""
    with torch.no_grad():
        target = _logits(teacher, batch)
    logits = _logits(model, batch)
    target, leaf = target.to(logits.device), logits.detach().requires_grad_()
    total = 0.0
    for rows in range(0, len(leaf), _ROWS):  # the distributions are larger than everything else
        part = _divergence(leaf[rows : rows + _ROWS], target[rows : rows + _ROWS]) / len(leaf)
        part.backward()
        total += part.item()
    logits.backward(leaf.grad)
    return total


@torch.no_grad()
def _mean_loss(model: nn.Module, teacher: nn.Module, batches: list[Batch]) -> float:
    total, tokens = 0.0, 0
    for batch in batches:
        found = _logits(model, batch)
        target = _logits(teacher, batch).to(found.device)
        total += sum(_divergence(a, b).item() for a, b in zip(found.split(_ROWS), target.split(_ROWS), strict=True))
        tokens += len(found)
    return total / tokens


def _partial(path: str | Path) -> Path:
    return Path(f"{path}.partial")


def _save(
    path: str | Path | None,
    changes: list[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    digest: str,
    losses: list[float],
) -> None:
    if path is None:
        return
    state = {"changes": [c.detach() for c in changes], "optimizer": optimizer.state_dict()}
    torch.save(state | {"digest": digest, "losses": losses}, _partial(path))
    os.replace(_partial(path), path)


def _read(path: str | Path, mmap: bool = False) -> dict[str, Any]:
    """What :func:`_save` wrote; it appeared whole, so half a file is none of ours. ``mmap``: without the tensors."""
    state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    if not isinstance(state, dict) or state.keys() != _STATE:
        raise ValueError(f"not a dictionary of {', '.join(sorted(_STATE))}")
    return state


def _resume(
    path: str | Path | None, changes: list[nn.Parameter], optimizer: torch.optim.Optimizer, digest: str
) -> list[float]:
    """Restore what :func:`_save` wrote in the same run; returns the losses so far."""
    if path is None or not Path(path).exists():
        return []
    state = _read(path)
    if state["digest"] != digest:
        logger.warning("%s is the progress of another run (other model, data or settings); starting over", path)
        return []
    for change, saved in zip(changes, state["changes"], strict=True):
        change.data.copy_(saved)
    optimizer.load_state_dict(state["optimizer"])
    return list(state["losses"])
