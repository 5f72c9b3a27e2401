"""Train the scales of quantized layers and the vectors beside them, such as norm weights; codes stay as they are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import CalibrationError
from ..format.weight import QuantizedWeight
from ..model.structure import evaluating, replace_module

_HELD_OUT = 8  # one batch in so many is held out to judge the result
_LEAST_FACTOR = 0.1  # of a scale; none changes its sign


def validation_batches(batches: int) -> list[int]:
    """Which of so many batches are held out: every eighth, or the last of fewer. Spread evenly, because
    :func:`calibration.make_batches` sorts by length.

    Raises:
        CalibrationError: fewer than two batches.
    """
    if batches < 2:
        raise CalibrationError(
            f"training needs at least two calibration batches (one is held out), got {batches}; pass more samples or a "
            "smaller batch_size, or set block_epochs=0 and distill_epochs=0"
        )
    return [*range(_HELD_OUT - 1, batches, _HELD_OUT)] or [batches - 1]


def schedule(batches: int, epochs: int) -> list[int]:
    """The batches that are not held out, in a random order of each epoch."""
    order = torch.Generator().manual_seed(0)
    rest = [i for i in range(batches) if i not in validation_batches(batches)]
    return [rest[int(i)] for _ in range(epochs) for i in torch.randperm(len(rest), generator=order)]


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
    """A linear layer with the codes of a quantized weight and a relative change of its scales, in the place of another,
    whose bias it adds and does not train.
    """

    def __init__(self, quantized: QuantizedWeight, place: nn.Module) -> None:
        super().__init__()
        device = next(place.parameters()).device
        quantized = quantized.to(device)
        index = quantized.g_idx.long()
        centred = quantized.codes.to(torch.int16) - quantized.zeros.to(torch.int16)[index]  # 9 bits with sign
        self.quantized = quantized
        self.bias = None if place.bias is None else place.bias.detach()  # type: ignore[operator]
        self.centred: Tensor
        self.index: Tensor
        self.scales: Tensor
        self.register_buffer("centred", centred.t().contiguous(), persistent=False)
        self.register_buffer("index", index, persistent=False)
        self.register_buffer("scales", quantized.scales.t().float().contiguous(), persistent=False)
        self.change = nn.Parameter(torch.zeros_like(self.scales))

    @property
    def weight(self) -> Tensor:
        """float32 [N, K]; the code of some models reads it, as T5's does for its dtype."""
        return _Dequantize.apply(self.scales * (1 + self.change), self.centred, self.index)

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)

    def result(self) -> QuantizedWeight:
        scales = (self.scales * (1 + self.change.detach())).t().to(self.quantized.scales)
        return dataclasses.replace(self.quantized, scales=scales.contiguous())

    def round(self) -> None:
        """To what will be stored."""
        self.scales = self.result().scales.t().to(self.scales).contiguous()
        self.change.data.zero_()


class Training:
    """A module made trainable: linear layers swapped for :class:`_Trained`, all other floats in float32 on a CPU.

    Adam works on float32 copies, the masters, of what is trained: a GPU computes with the types that the model has.

    Args:
        module: a model or one block of it.
        sources: the weight of each layer to train, by its name in the module.
        vectors: parameters of the module to train beside them.
        stored: gives the dtype that a parameter will be stored in.
    """

    def __init__(
        self,
        module: nn.Module,
        sources: Mapping[str, QuantizedWeight],
        vectors: Iterable[nn.Parameter],
        stored: Callable[[Tensor], torch.dtype],
    ) -> None:
        self.module, self.keep = module, False
        self.places = {name: module.get_submodule(name) for name in sources}
        self.vectors = list(vectors)
        other = {id(parameter) for place in self.places.values() for parameter in place.parameters()}
        other |= {id(vector) for vector in self.vectors}
        fixed = [p for p in module.parameters() if id(p) not in other and p.is_floating_point()]
        self.fixed = [(parameter, parameter.dtype, parameter.requires_grad) for parameter in fixed]
        self.before = [(vector.data, vector.requires_grad) for vector in self.vectors]
        self.stored = [stored(vector) for vector in self.vectors]
        self.layers = {name: _Trained(sources[name], place) for name, place in self.places.items()}

    def begin(self) -> None:
        """Change the module; whatever happens here, :meth:`end` undoes it."""
        for parameter, _, _ in self.fixed:
            parameter.requires_grad_(False)
            parameter.data = parameter.data.to(_computing(parameter))
        for vector in self.vectors:
            vector.requires_grad_(True)
            vector.data = vector.data.to(_computing(vector), copy=True)
        self.masters = [
            nn.Parameter(vector.detach().to(torch.promote_types(vector.dtype, torch.float32), copy=True))
            for vector in self.vectors
        ]
        for name, layer in self.layers.items():
            replace_module(self.module, name, layer)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What Adam changes."""
        return [layer.change for layer in self.layers.values()] + self.masters

    @property
    def computing(self) -> list[nn.Parameter]:
        """What the module computes with in their place, and gradients are of."""
        return [layer.change for layer in self.layers.values()] + self.vectors

    def optimizer(self, rate: float) -> torch.optim.Optimizer:
        """Adam that changes every parameter by at most about ``rate`` of its size in one step."""
        groups: list[dict[str, Any]] = [{"params": [layer.change for layer in self.layers.values()], "size": 1.0}]
        groups += [{"params": [master], "size": float(master.detach().abs().mean()) or 1.0} for master in self.masters]
        return torch.optim.Adam(groups, lr=rate, betas=(0.9, 0.95))

    def run(
        self,
        batches: Sequence[int],
        rate: float,
        backward: Callable[[int], float],
        optimizer: torch.optim.Optimizer | None = None,
        losses: Sequence[float] = (),
        after_step: Callable[[int, list[float]], None] = lambda steps, losses: None,
    ) -> list[float]:
        """Take a step for each entry of ``batches`` -> the loss of each.

        Args:
            batches: what to call ``backward`` with.
            rate: largest relative change of a parameter in one step; falls to zero along a cosine.
            backward: accumulates the gradient of a batch's loss, and returns the loss.
            optimizer, losses: of a run that goes on after so many steps.
            after_step: called with the number of steps and the losses so far.
        """
        optimizer, losses, steps = optimizer or self.optimizer(rate), list(losses), len(batches)
        for step in range(len(losses), steps):
            warm_up = min(1.0, (step + 1) / max(1, steps // 20))
            for group in optimizer.param_groups:
                group["lr"] = rate * group["size"] * warm_up * 0.5 * (1 + math.cos(math.pi * step / steps))
            optimizer.zero_grad()
            losses.append(backward(batches[step]))
            for master, vector in zip(self.masters, self.vectors, strict=True):
                master.grad = None if vector.grad is None else vector.grad.to(master.dtype)
                vector.grad = None
            optimizer.step()
            for layer in self.layers.values():
                layer.change.data.clamp_(min=_LEAST_FACTOR - 1)
            self.publish()
            after_step(step + 1, losses)
        return losses

    def publish(self) -> None:
        """Let the module compute with the masters."""
        for master, vector in zip(self.masters, self.vectors, strict=True):
            vector.data.copy_(master.data)

    def round(self) -> None:
        """Everything to what will be stored."""
        for layer in self.layers.values():
            layer.round()
        for master, dtype in zip(self.masters, self.stored, strict=True):
            master.data = master.data.to(dtype).to(master.dtype)
        self.publish()

    def results(self) -> dict[str, QuantizedWeight]:
        """The weight of each layer, as it will be stored."""
        return {name: layer.result() for name, layer in self.layers.items()}

    def end(self) -> None:
        """Put the layers back as they were, and, unless ``keep`` is set, the vectors too."""
        for name, place in self.places.items():
            replace_module(self.module, name, place)
        for parameter, dtype, required in self.fixed:
            parameter.data = parameter.data.to(dtype)
            parameter.requires_grad_(required)
        for vector, (data, required) in zip(self.vectors, self.before, strict=True):
            vector.data = vector.data.to(data.dtype) if self.keep else data
            vector.requires_grad_(required)
            vector.grad = None


def _computing(parameter: Tensor) -> torch.dtype:
    """CPUs emulate the products of 16-bit types."""
    on_cpu = parameter.device.type == "cpu"
    return torch.promote_types(parameter.dtype, torch.float32) if on_cpu else parameter.dtype


@contextmanager
def trainable(
    module: nn.Module,
    sources: Mapping[str, QuantizedWeight],
    vectors: Iterable[nn.Parameter],
    stored: Callable[[Tensor], torch.dtype] = lambda parameter: parameter.dtype,
) -> Iterator[Training]:
    """A :class:`Training` and its end."""
    with evaluating(module):
        state = Training(module, sources, vectors, stored)
        try:
            state.begin()
            yield state
        finally:
            state.end()
