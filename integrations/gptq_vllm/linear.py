"""Quantized linear layers and output embeddings of a vLLM model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config_or_none
from vllm.model_executor.layers.linear import (
    LinearMethodBase,
    QKVParallelLinear,
    register_weight_loader_v2_supported_method,
)

from .checkpoint import Use
from .fused_weight import Segments
from .pieces import AnyPiece
from .tensor_collector import Arrivals, add_parameters, input_columns, missing, output_rows, remove_parameters

if TYPE_CHECKING:
    from .config import GPTQBackendConfig
    from .experts import Experts


@register_weight_loader_v2_supported_method
class GPTQLinearMethod(LinearMethodBase):
    """A linear layer of which at least one shard is quantized.

    Args:
        config: knows the checkpoint.
        names: vLLM's names of the stored layers that it consists of, in order.
    """

    def __init__(self, config: GPTQBackendConfig, names: list[str]) -> None:
        self.config, self.names = config, names

    def create_weights(
        self,
        layer: nn.Module,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        layer.incoming = _Incoming(  # type: ignore[assignment]
            layer,
            self.config,
            self.names,
            (input_size_per_partition, input_size),
            sum(output_partition_sizes),
            params_dtype,
            extra_weight_attrs["weight_loader"],
        )

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        incoming: _Incoming = layer.incoming  # type: ignore[assignment]
        del layer.incoming
        layer.segments = Segments(incoming.pieces(), incoming.dtype, self.config.backend)
        remove_parameters(layer)
        layer.register_parameter("qweight", layer.segments.first)  # LoRA finds the layer's device by this name
        announce(layer.segments)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return layer.segments.forward(x, bias)  # type: ignore[union-attr,operator]


class GPTQHeadMethod(GPTQLinearMethod):
    """A quantized output embedding."""

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """The embedding is dense and the head is not: whatever the config says, they are not the same weight."""
        return layer


class _Incoming:
    """The stored layers of one layer while vLLM loads them.

    Args:
        layer, config, names: see :class:`GPTQLinearMethod`.
        inputs: input channels on this rank, and of all ranks together.
        outputs: output channels on this rank.
        dtype: of the model.
        loader: vLLM's, for an unquantized weight of this layer.
    """

    def __init__(
        self,
        layer: nn.Module,
        config: GPTQBackendConfig,
        names: list[str],
        inputs: tuple[int, int],
        outputs: int,
        dtype: torch.dtype,
        loader: Callable[..., Any],
    ) -> None:
        self.layer, self.names, self.inputs, self.outputs = layer, names, inputs, outputs
        self.dtype, self._loader = dtype, loader
        biased = bool(getattr(layer, "has_bias", False))
        self._prefix: str = layer.prefix  # type: ignore[assignment]
        uses = {name: Use(inputs[1], _outputs(layer, names, i), biased) for i, name in enumerate(names)}
        uses.setdefault(self._prefix, Use(inputs[1], None, biased))
        self._arrivals = Arrivals(config, uses)
        self._shards: dict[str, tuple[Any, ...]] = {}
        self._placed: list[tuple[Tensor, AnyPiece]] = []
        add_parameters(layer, self.receive, config.dtypes(names[0]))

    def receive(self, part: str, tensor: Tensor, *shard: Any) -> None:
        """Take one tensor from vLLM's loader. shard: its id, for a layer that is stored in several."""
        shard = () if shard in ((), (None,)) else shard
        name = self._name(shard)
        self._shards[name] = shard
        if (piece := self._arrivals.add(name, part, tensor)) is not None:
            self._place(name, piece)

    def pieces(self) -> list[AnyPiece]:
        """All pieces in the order of their outputs.

        Raises:
            CheckpointError: some are missing.
        """
        for name, piece in self._arrivals.rest():
            self._place(name, piece)
        owner = torch.full((self.outputs,), -1)
        for i, (rows, _) in enumerate(self._placed):
            owner[rows] = i
        known = int((owner >= 0).nonzero().max()) + 1 if self._placed else 0
        if not known or bool((owner[:known] < 0).any()):
            raise missing(next((name for name in self.names if name not in self._shards), self._prefix))
        order = sorted(self._placed, key=lambda entry: int(entry[0][0]))
        pieces = [piece for _, piece in order]
        pieces[-1] = pieces[-1].padded(len(order[-1][0]) + self.outputs - known)
        return pieces

    def _name(self, shard: tuple[Any, ...]) -> str:
        if not shard or not isinstance(shard[0], (int, str)):
            return self.names[0] if len(self.names) == 1 else self._prefix
        index = "qkv".find(shard[0]) if isinstance(shard[0], str) else shard[0]
        if 0 <= index < len(self.names) and len(self.names) > 1:
            return self.names[index]
        name = f"{self._prefix}[{shard[0]}]"
        self._arrivals.use(name, Use(self.inputs[1], None, False))
        return name

    def _place(self, name: str, piece: AnyPiece) -> None:
        """Keep what this rank needs of a stored layer."""
        here, everywhere = self.inputs
        stored = piece.out_features
        if here != everywhere:
            piece = piece.inputs(*input_columns(self.layer, self._loader, everywhere, here))
            rows = torch.arange(1, stored + 1)
        else:
            rows = output_rows(self.layer, self._loader, stored, self.outputs, *self._shards[name])
        taken = rows.nonzero()[:, 0]
        if len(taken):
            self._placed.append((taken, piece.outputs(rows[taken] - 1).to(self._device)))

    @property
    def _device(self) -> torch.device:
        return self.layer.qweight.device  # type: ignore[union-attr,return-value]


def _outputs(layer: nn.Module, names: list[str], index: int) -> int | None:
    """Output channels of the stored layer number ``index``, all ranks together; None where that is not obvious."""
    if type(layer) is QKVParallelLinear and len(names) == 3:
        heads = layer.total_num_heads if index == 0 else layer.total_num_kv_heads
        return heads * (layer.v_head_size if index == 2 else layer.head_size)
    sizes = getattr(layer, "output_sizes", None)
    if sizes is not None:
        return sizes[index] if len(sizes) == len(names) and not isinstance(layer, QKVParallelLinear) else None
    return getattr(layer, "org_vocab_size", None) or getattr(layer, "output_size", None)


def announce(weight: Segments | Experts) -> None:
    """Tell vLLM's cache of compiled graphs apart what it does not see: which kernels serve which formats.

    A graph calls the operators of the kernels that were chosen on this machine, with sizes that differ between
    checkpoints of one architecture. Neither is among what vLLM hashes.
    """
    config = get_current_vllm_config_or_none()
    if config is not None and isinstance(config.additional_config, dict):
        seen = config.additional_config.get("gptq_backend", "")
        config.additional_config["gptq_backend"] = hashlib.sha256((seen + weight.describe()).encode()).hexdigest()
