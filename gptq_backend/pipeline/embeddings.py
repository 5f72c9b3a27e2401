"""Which embedding of tokens is to be quantized, in which layout, and which output embedding is the same weight."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..algorithm.nearest import round_to_nearest
from ..config import QuantizeConfig
from ..embedding import QuantEmbedding, TiedHead, embed_scale
from ..errors import ConfigError
from ..format.stored_tensors import check_planes
from ..format.weight import QuantizedWeight
from ..model.structure import input_embeddings, is_linear, replace_module

_GROUP = 64  # of one that is for a whole row of the layers: an embedding has no rows as alike


@dataclass(frozen=True, eq=False)
class EmbeddingTarget:
    """An embedding to quantize.

    Args:
        name, module: of the embedding.
        config: how it is rounded.
        head: full name of the output embedding that is tied to it, or None.
    """

    name: str
    module: nn.Embedding
    config: QuantizeConfig
    head: str | None

    @property
    def calibrated(self) -> bool:
        """Whether the inputs of the output embedding shall tell how it is rounded: 8 bits are exact enough without."""
        return self.head is not None and self.config.bits < 8

    @property
    def rule(self) -> dict[str, Mapping[str, Any]]:
        """What a reader of the checkpoint has to know, as an entry of ``dynamic``."""
        settings = {key: getattr(self.config, key) for key in ("bits", "group_size", "sym", "desc_act")}
        return {f"+:^{re.escape(self.name)}$": settings}

    def round(self) -> QuantizedWeight:
        """To nearest; by token if an output embedding is to multiply with it, else by channel."""
        weight = self.module.weight.detach()
        return round_to_nearest(weight if self.head is not None else weight.t(), self.config)

    def install(self, model: nn.Module, weight: QuantizedWeight, backend: str | None) -> None:
        """Put the quantized embedding into the model, and a head that multiplies with it if there was a tied one."""
        words = getattr(torch, self.config.pack_dtype)
        facts = (self.config.checkpoint_format, words, self.name, backend)
        embedding = QuantEmbedding.of_weight(weight, self.module, self.head is not None, *facts)
        replace_module(model, self.name, embedding)
        if self.head is not None:
            bias: Any = model.get_submodule(self.head).bias
            replace_module(model, self.head, TiedHead(embedding, bias))


def find_embedding(model: nn.Module, config: QuantizeConfig) -> EmbeddingTarget | None:
    """What ``config.embed_bits`` asks for.

    Raises:
        ConfigError: the model has no such embedding, or its weight is used in a way that is not known here.
    """
    if config.embed_bits is None and config.embed_group_size is None:
        return None
    if config.embed_bits is None:
        raise ConfigError(
            f"embed_group_size={config.embed_group_size}, but the embedding stays in 16 bits; set embed_bits too"
        )
    asked, module = f"embed_bits={config.embed_bits}", input_embeddings(model)
    if not isinstance(module, nn.Embedding):
        raise ConfigError(f"{asked}, but {type(model).__name__} has no embedding of tokens; leave it out")
    name = next(name for name, each in model.named_modules() if each is module)
    embed_scale(module, name, module.weight.dtype)
    owners = [
        owner
        for owner, each in model.named_modules(remove_duplicate=False)
        if each._parameters.get("weight") is module.weight and owner != name
    ]
    head = _head_name(model)
    if owners and (owners != [head] or not is_linear(model.get_submodule(head))):
        raise ConfigError(
            f"{asked}, but {type(model).__name__} uses the weight of {name} in {', '.join(owners)} too, and only a "
            "linear output embedding can share packed words; leave embed_bits out"
        )
    if owners and config.lm_head:
        raise ConfigError(
            f"{asked} quantizes the output embedding too, since {type(model).__name__} ties them; leave lm_head out, "
            "which would give it a weight of its own"
        )
    if config.embed_group_size == -1 and not owners:
        raise ConfigError(
            f"embed_group_size=-1 is one scale for a token, but {type(model).__name__} has no head that is tied to "
            f"{name}, and then a group is of tokens that follow each other; pass their number, or leave it out"
        )
    size = config.embed_group_size or (_GROUP if config.group_size == -1 else config.group_size)
    own = dataclasses.replace(
        config,
        bits=config.embed_bits,
        group_size=min(size, module.embedding_dim) if owners else size,
        desc_act=False,
        act_group_aware=None,
        dynamic=None,
    )
    instead = "use embed_bits=8 or 4, or leave embed_bits out"
    check_planes(name, (module.num_embeddings, module.embedding_dim), own.bits, own.checkpoint_format, instead)
    return EmbeddingTarget(name, module, own, head if owners else None)


def output_embeddings(model: nn.Module) -> Any:
    """The layer that predicts tokens, of a model that tells which one that is; else None."""
    getter = getattr(model, "get_output_embeddings", None)
    return getter() if getter else None


def _head_name(model: nn.Module) -> str:
    head = output_embeddings(model)
    return next((name for name, each in model.named_modules() if each is head), "")
