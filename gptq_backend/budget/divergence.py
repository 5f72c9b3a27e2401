"""How much a layer's rounding errors move the model's predictions, by one backward pass per window.

For small changes dw of the weights, the KL divergence of a text from the original is ``dw^T F dw / 2`` with F the
Fisher information: the mean of ``g g^T`` over gradients g of the log-likelihood of tokens that the model itself draws
(Amari 1998; Martens, arXiv 1412.1193). Here the gradient of a whole window is multiplied with the errors that GPTQ has
really made, so that errors which add up over tokens count as such. Those of different output channels are taken as
independent, as rounding makes them; that takes most of the noise out of the few windows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ConfigError
from ..model.calibration import Batch
from ..model.placement import Placement, tensors_of
from ..model.structure import dense_weight, evaluating
from ..training.distill import ROWS
from .predictions import predictions
from .rounding import Group, Probe
from .storage import Storage

_NOT_FINITE = (
    "a budget is spent by what rounding does to predictions, but the model's own, or their derivatives, are not "
    "finite; the dtype may overflow, or the weights are damaged"
)


def predict_divergences(
    model: nn.Module,
    groups: Sequence[Group],
    batches: Sequence[Batch],
    placement: Placement,
    on_batch: Callable[[], None],
    seed: int = 0,
) -> list[dict[Storage, float]]:
    """The KL divergence in nats per predicted token that each group's errors cause, by way to store it.

    The model is in memory as a whole and computes where ``placement`` says; ``on_batch`` is called after each batch.

    Raises:
        ConfigError: the model predicts nothing or what is not finite, or no derivatives can be taken.
    """
    probes = [probe for group in groups for probe in group.probes]
    sums = {probe: dict.fromkeys(probe.errors, 0.0) for probe in probes}
    generator = torch.Generator().manual_seed(seed)
    parameters = [each for each in model.parameters() if each.requires_grad]
    tokens = 0
    tensors = tensors_of(model)
    if any(tensor.is_inference() for tensor in tensors):
        raise ConfigError(
            "a budget is spent by derivatives, but the model was loaded in torch.inference_mode; load it outside of it"
        )
    placement.bring(tensors)
    try:
        for parameter in parameters:
            parameter.requires_grad_(False)
        with evaluating(model):
            for batch in batches:
                gradients, count = _gradients(model, probes, batch, placement, generator)
                tokens += count
                for probe, gradient in gradients.items():
                    for storage, errors in probe.errors.items():
                        along = (gradient * errors.to(gradient.device)).sum(1)
                        sums[probe][storage] += float(along.square().sum()) / 2
                on_batch()
    finally:
        placement.send_back(tensors)
        for parameter in parameters:
            parameter.requires_grad_(True)
    if not all(math.isfinite(found) for by_storage in sums.values() for found in by_storage.values()):
        raise ConfigError(_NOT_FINITE)
    return [{each: _sum(group, sums, each) / tokens for each in group.choices} for group in groups]


def _sum(group: Group, sums: dict[Probe, dict[Storage, float]], storage: Storage) -> float:
    """Of all channels of all of a group's layers, from those that were probed."""
    found = sum(sums[probe].get(storage, 0.0) / _share(probe) for probe in group.probes)
    return found * len(group.names) / len(group.probes)


def _share(probe: Probe) -> float:
    """Of the layer's output channels that are in the sample."""
    return len(probe.channels) / dense_weight(probe.target.module).shape[0]


def _gradients(
    model: nn.Module, probes: Sequence[Probe], batch: Batch, placement: Placement, generator: torch.Generator
) -> tuple[dict[Probe, Tensor], int]:
    """Of the log-likelihood of drawn tokens for the probed rows [C, K] of each weight; and the number of tokens."""
    found: dict[Probe, Tensor] = {}

    def add(probe: Probe, x: Tensor, gradient: Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1])[:, probe.channels.to(gradient.device)].float()
        part = rows.t() @ x.reshape(-1, x.shape[-1]).float()
        found[probe] = found[probe] + part if probe in found else part

    def follow(probe: Probe, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], y: Tensor) -> Tensor:
        x = next(iter((*args, *kwargs.values()))).detach()
        y = y if y.requires_grad else y.detach().requires_grad_()
        y.register_hook(partial(add, probe, x))
        return y.clone()  # the model may write into it

    with torch.inference_mode(False), torch.enable_grad(), ExitStack() as hooks:
        for probe in probes:
            hook = partial(follow, probe)
            hooks.callback(probe.target.module.register_forward_hook(hook, with_kwargs=True).remove)
        logits = predictions(model, batch, placement)
        if not logits.requires_grad:
            raise ConfigError(
                f"a budget is spent by derivatives, and {type(model).__name__} takes none (torch.no_grad in its "
                "forward?); choose bits yourself"
            )
        logits.backward(_of_drawn_tokens(logits.detach(), generator))
    return found, len(logits)


def _of_drawn_tokens(logits: Tensor, generator: torch.Generator) -> Tensor:
    """The derivatives of the log-likelihood of a token drawn in each row of ``logits`` [T, V], in its dtype."""
    gradient = torch.empty_like(logits)
    for rows, into in zip(logits.split(ROWS), gradient.split(ROWS)):
        shares = rows.float().softmax(-1)
        if shares.isnan().any():
            raise ConfigError(_NOT_FINITE)
        drawn = torch.multinomial(shares.cpu(), 1, generator=generator).to(rows.device)
        into.copy_(shares.neg_().scatter_add_(1, drawn, torch.ones_like(drawn, dtype=shares.dtype)))
    return gradient
