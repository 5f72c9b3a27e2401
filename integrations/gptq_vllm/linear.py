"""Quantized linear layers and output embeddings of a vLLM model."""

from __future__ import annotations

import hashlib
import weakref
from typing import Any

import torch
from torch import Tensor

from gptq_backend import PackedWeight, __version__

from .compat import (
    LinearBase,
    LinearMethodBase,
    ParallelLMHead,
    QKVParallelLinear,
    get_current_vllm_config_or_none,
    register_weight_loader_v2_supported_method,
)
from .fused_weight import FusedWeight
from .held_weight import hold
from .pieces import AnyPiece
from .stored_layers import ExpectedLayer, StoredLayers
from .tensor_collector import TensorCollector, add_parameters, first_input, missing, output_rows, remove_parameters


@register_weight_loader_v2_supported_method
class GPTQLinearMethod(LinearMethodBase):
    """A linear layer of which at least one shard is quantized. There is one method per layer.

    Args:
        names: vLLM's names of those that it consists of, in order.
    """

    def __init__(self, stored: StoredLayers, names: list[str]) -> None:
        self.stored, self.names = stored, names
        self._shards: dict[str, tuple[Any, ...]] = {}  # the shard ids of the stored layers of which something came
        # By vLLM's name, with the output channels that it is for: int64 [n].
        self._placed: dict[str, tuple[Tensor, AnyPiece]] = {}

    def create_weights(
        self,
        layer: LinearBase | ParallelLMHead,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        # vLLM keeps our loaders, and with them this method, for reloads: nothing here may keep the layer alive.
        self._layer, self._loader = weakref.ref(layer), weakref.WeakMethod(extra_weight_attrs["weight_loader"])
        # A head is stored as it is, and does not know its name in vLLM 0.30.
        self._prefix = layer.prefix if isinstance(layer, LinearBase) else self.names[0]
        self._dtype, self._fixed = params_dtype, follow_model(self.stored)
        self._inputs, self._all_inputs = input_size_per_partition, input_size
        self._outputs = sum(output_partition_sizes)
        has_bias = bool(getattr(layer, "has_bias", False))
        layers = {self._prefix: ExpectedLayer(input_size, None, has_bias)}
        for i, name in enumerate(self.names):
            layers[name] = self._expected(layer, i, input_size, has_bias)
        self._collector = TensorCollector(self.stored, layers, self._place, self._placed.clear)
        add_parameters(layer, self._load, self.stored.checkpoint.parts(self.names[0]))
        self._device = layer.qweight.device

    def _expected(self, layer: Any, index: int, input_size: int, has_bias: bool) -> ExpectedLayer:
        return ExpectedLayer(input_size, _stored_outputs(layer, self.names, index), has_bias)

    def process_weights_after_loading(self, layer: LinearBase | ParallelLMHead) -> None:
        with self._collector.finished(layer):
            remove_parameters(layer)
            weight = FusedWeight(self._weights(), self._dtype, self.stored.backend)
            if hold(layer, "segments", weight, self._fixed):
                self.stored.fused.loaded(layer)
        announce(layer.segments.describe())
        finish_loading(self.stored, self, layer.segments.kernels)

    def apply(self, layer: LinearBase | ParallelLMHead, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.segments.forward(x, bias)

    def _load(self, part: str, param: Tensor, tensor: Tensor, *shard: Any) -> None:
        """Take one tensor from vLLM's loader. shard: its id, for a layer that is stored in several."""
        shard = () if shard == (None,) else shard
        name = self._name(*shard[:1])
        self._shards[name] = shard
        self._collector.receive(param, name, part, tensor)

    def _name(self, shard: Any = None) -> str:
        """Of the stored layer that vLLM calls ``shard``. Some models call several at once by a tuple."""
        if not isinstance(shard, (int, str)):
            return self.names[0] if len(self.names) == 1 else self._prefix
        index = "qkv".find(shard) if isinstance(shard, str) else shard
        if 0 <= index < len(self.names) and len(self.names) > 1:
            return self.names[index]
        name = f"{self._prefix}[{shard}]"
        self._collector.expect(name, ExpectedLayer(self._all_inputs, None))
        return name

    def _place(self, name: str, weight: AnyPiece) -> None:
        """Keep what this rank needs of a stored layer."""
        layer, loader, stored = self._layer(), self._loader(), weight.out_features
        if isinstance(weight, PackedWeight) and self.stored.pairs_to_halves:
            weight = _halves_of_pairs(layer, self.names.index(name), weight)
        assert loader is not None  # vLLM is loading into the layer
        if self._inputs != self._all_inputs:
            first = first_input(layer, loader, self._all_inputs, self._inputs)
            weight = weight.inputs(first, self._inputs)
            rows = torch.arange(1, stored + 1)
        else:
            rows = output_rows(layer, loader, stored, self._outputs, *self._shards[name])
        taken = rows.nonzero()[:, 0]
        if len(taken):
            self._placed[name] = (taken, weight.outputs(rows[taken] - 1).to(self._device))

    def _weights(self) -> list[AnyPiece]:
        """All that was placed, in the order of the outputs; this forgets it.

        Raises:
            CheckpointError: some are missing.
        """
        placed = sorted(self._placed.values(), key=lambda entry: int(entry[0][0]))
        self._placed.clear()
        covered = torch.zeros(self._outputs, dtype=torch.bool)
        for rows, _ in placed:
            covered[rows] = True
        known = int(covered.nonzero().max()) + 1 if placed else 0
        if not known or not bool(covered[:known].all()):
            raise missing(next((name for name in self.names if name not in self._shards), self._prefix))
        weights = [weight for _, weight in placed]
        weights[-1] = weights[-1].padded(weights[-1].out_features + self._outputs - known)
        return weights


class GPTQHeadMethod(GPTQLinearMethod):
    """A quantized output embedding."""

    def tie_weights(self, layer: ParallelLMHead, embed_tokens: Any) -> ParallelLMHead:
        """The embedding is dense and the head is not: whatever the config says, they are not the same weight."""
        return layer


def _stored_outputs(layer: Any, names: list[str], index: int) -> int | None:
    """Output channels of the stored layer number ``index``, all ranks together; None where that is not obvious."""
    if type(layer) is QKVParallelLinear and len(names) == 3:
        heads = layer.total_num_heads if index == 0 else layer.total_num_kv_heads
        return heads * (layer.v_head_size if index == 2 else layer.head_size)
    sizes = getattr(layer, "output_sizes", None)
    if sizes is not None:
        return sizes[index] if len(sizes) == len(names) and not isinstance(layer, QKVParallelLinear) else None
    return getattr(layer, "org_vocab_size", None) or getattr(layer, "output_size", None)


def _halves_of_pairs(layer: Any, shard: int, weight: PackedWeight) -> PackedWeight:
    """What the loader of vLLM's Llama 4 does to a dense q_proj or k_proj: of each head the pairs of channels that are
    rotated together become one half of the head each.
    """
    if not isinstance(layer, QKVParallelLinear) or shard > 1:
        return weight
    heads = layer.total_num_kv_heads if shard else layer.total_num_heads
    return weight.outputs(torch.arange(weight.out_features).view(heads, -1, 2).transpose(1, 2).flatten())


def follow_model(stored: StoredLayers) -> bool:
    """Let ``stored`` follow the model that vLLM is building -> whether graphs will be made over it."""
    config = get_current_vllm_config_or_none()
    if config is None or config.model_config is None:
        return False
    stored.follow(config)
    return not config.model_config.enforce_eager


def finish_loading(stored: StoredLayers, method: Any, kernels: set[str]) -> None:
    """The layer of ``method``, which ``kernels`` serve, has its weight; with the last, the model is complete."""
    if stored.report.loaded(method, kernels) and (fused := stored.fused.fuse()) is not None:
        announce(fused)


def announce(weight: str) -> None:
    """Tell vLLM's cache of compiled graphs what it does not see: ``weight`` says which kernels serve which formats.

    A graph calls the operators of the kernels that were chosen on this machine, in the way of this version, with sizes
    that differ between checkpoints of one architecture. Nothing of this is among what vLLM hashes.
    """
    config = get_current_vllm_config_or_none()
    if config is not None and isinstance(config.additional_config, dict):
        seen = config.additional_config.get("gptq_backend", __version__)
        config.additional_config["gptq_backend"] = hashlib.sha256((seen + weight).encode()).hexdigest()
