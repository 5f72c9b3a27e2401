"""What rounding the embedding of tokens costs: tried, since there are few ways to do it."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..algorithm.gptq import prepare_factor, round_weights
from ..algorithm.hessian import Hessian
from ..config import QuantizeConfig
from ..errors import ConfigError
from ..model.calibration import Batch, model_inputs
from ..model.placement import Placement, tensors_of
from ..model.structure import evaluating
from ..pipeline.embeddings import EmbeddingTarget, find_embedding
from ..training.distill import summed_divergence
from .predictions import predictions

WIDTHS = (8, 4)  # which every kernel multiplies, beside 16
_GROUP = 64


def embedding_targets(model: nn.Module, config: QuantizeConfig) -> dict[int, EmbeddingTarget]:
    """Ways to quantize the embedding, by bits: as ``config`` asks for, or :data:`WIDTHS`; {} where it has to stay."""
    found = {}
    for bits in WIDTHS if config.embed_bits is None else (config.embed_bits,):
        own = dataclasses.replace(config, embed_bits=bits, embed_group_size=config.embed_group_size or _GROUP)
        try:
            target = find_embedding(model, own)
        except ConfigError:
            if config.embed_bits is not None:
                raise
            continue
        if target is not None:
            found[bits] = target
    return found


@torch.no_grad()
def measure_embeddings(
    model: nn.Module, targets: dict[int, EmbeddingTarget], batches: Sequence[Batch], placement: Placement
) -> dict[int, float]:
    """The KL divergence in nats per token with the embedding rounded, by bits; the model is in memory as a whole."""
    if not targets:
        return {}
    tensors = tensors_of(model)
    placement.bring(tensors)
    try:
        with evaluating(model):
            rounded = _rounded(model, targets, batches, placement)
            sums, tokens = dict.fromkeys(targets, 0.0), 0
            for batch in batches:
                original = predictions(model, batch, placement)
                tokens += len(original)
                for bits, weight in rounded.items():
                    with _replaced(targets[bits].module.weight, weight):
                        found = predictions(model, batch, placement)
                    sums[bits] += summed_divergence(found, original)
    finally:
        placement.send_back(tensors)
    return {bits: total / tokens for bits, total in sums.items()}


def _rounded(
    model: nn.Module, targets: dict[int, EmbeddingTarget], batches: Sequence[Batch], placement: Placement
) -> dict[int, Tensor]:
    """[V, H], in the dtype of the weight."""
    found: dict[int, Tensor] = {}
    hessian: Hessian | None = None
    for bits, target in targets.items():
        dense = target.module.weight.detach()
        if target.calibrated:
            assert target.head is not None
            hessian = hessian or _head_inputs(model, model.get_submodule(target.head), batches, placement)
            factor = prepare_factor(hessian.matrix(target.head), target.config, hessian.tokens)
            weight = round_weights([dense.float()], factor, target.config)[0].dequantize()
        else:
            weight = target.round().dequantize()
            weight = weight if target.head is not None else weight.t()
        found[bits] = weight.to(dense.dtype)
    return found


def _head_inputs(model: nn.Module, head: nn.Module, batches: Sequence[Batch], placement: Placement) -> Hessian:
    """Second moments of what the output embedding reads."""
    found: list[Hessian] = []

    def add(_: nn.Module, args: tuple[Any, ...]) -> None:
        x = args[0]
        if not found:
            found.append(Hessian(x.shape[-1], torch.promote_types(x.dtype, torch.float32), x.device))
        found[0].add(x)

    hook = head.register_forward_pre_hook(add)
    try:
        for batch in batches:
            model(**model_inputs(model, batch, placement.device))
    finally:
        hook.remove()
    return found[0]


@contextmanager
def _replaced(weight: Tensor, data: Tensor) -> Iterator[None]:
    """Other values, for as long as it takes."""
    own, weight.data = weight.data, data
    try:
        yield
    finally:
        weight.data = own
