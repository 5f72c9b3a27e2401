"""Quantized experts of a vLLM mixture-of-experts layer."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config_or_none
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.fused_moe import FusedMoEMethodBase, FusedMoEQuantConfig, RoutedExperts
from vllm.model_executor.layers.fused_moe.activation import (
    ApplyMoEActivationConfig,
    apply_moe_activation,
    apply_moe_activation_supported,
)
from vllm.utils.torch_utils import LayerName, LayerNameType, direct_register_custom_op

from gptq_backend import ConfigError
from gptq_backend.kernels import Routing

from .checkpoint import Use
from .experts import Experts
from .linear import announce
from .pieces import AnyPiece
from .tensor_collector import Arrivals, add_parameters, missing, remove_parameters

if TYPE_CHECKING:
    from .config import GPTQBackendConfig


class GPTQMoEMethod(FusedMoEMethodBase):
    """Experts of which at least one projection is quantized; each may have a spec of its own."""

    def __init__(self, config: GPTQBackendConfig, layer: RoutedExperts) -> None:
        super().__init__(layer.moe_config)
        self.config = config
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is not None and vllm_config.lora_config is not None:
            # vLLM would wrap the experts even where no adapter touches them, and fail on kernels that are not its own.
            raise ConfigError(
                "LoRA on a mixture of experts whose experts are quantized is not supported; leave out --enable-lora, "
                "or merge the adapter before quantizing"
            )
        if layer.moe_config.has_bias:  # vLLM's loader looks for biases by names that only its own methods have
            raise ConfigError(
                f"{layer.layer_name}: quantized experts with biases, as gpt-oss has them, are not supported in vLLM; "
                "load the model with transformers"
            )
        if not apply_moe_activation_supported(layer.activation):
            raise ConfigError(
                f"{layer.layer_name}: experts with the activation {layer.activation.value!r} are not supported in a "
                "quantized model; serve the model without quantization"
            )

    def create_weights(
        self,
        layer: RoutedExperts,
        num_experts: int,
        hidden_size: int,
        intermediate_size_per_partition: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        sizes = (hidden_size, intermediate_size_per_partition)
        layer.incoming = _IncomingExperts(layer, self.config, sizes, params_dtype)

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        incoming: _IncomingExperts = layer.incoming
        del layer.incoming
        # vLLM would do this on the first call, which a compiled graph does not make.
        self.moe_quant_config = self.get_fused_moe_quant_config(layer)
        self.activation_config = ApplyMoEActivationConfig.from_configs(layer.moe_config, self.moe_quant_config)
        remove_parameters(layer, "w13_{}")
        remove_parameters(layer, "w2_{}")
        backend = self.config.backend
        for name, shards in (("w13", incoming.first_shards), ("w2", ("w2",))):
            pieces = ([incoming.piece(i, shard) for shard in shards] for i in range(layer.local_num_experts))
            experts = Experts(pieces, incoming.dtype, backend, " and ".join(shards))
            layer.add_module(name, experts)
            announce(experts)

    def get_fused_moe_quant_config(self, layer: RoutedExperts) -> FusedMoEQuantConfig:
        """Settings of the activation; vLLM has no description for weights as mixed as these may be."""
        return FusedMoEQuantConfig.make(
            gemm1_alpha=layer.swiglu_alpha, gemm1_beta=layer.swiglu_beta, gemm1_clamp_limit=layer.swiglu_limit
        )

    def apply(
        self,
        layer: RoutedExperts,
        x: Tensor,
        topk_weights: Tensor,
        topk_ids: Tensor,
        shared_experts: Any,
        shared_experts_input: Tensor | None,
    ) -> Tensor:
        """x: float [T, H]; topk_weights: float [T, k]; topk_ids: int [T, k] -> [T, H] of this rank's experts."""
        if torch.compiler.is_compiling():
            # How many tokens an expert gets is data, and matters where experts are multiplied one by one. Around all
            # of it there is one operator for the graph to call.
            return torch.ops.gptq_vllm.experts(x, topk_weights, topk_ids, _encoded(layer.layer_name))
        return run_experts(layer, x, topk_weights, topk_ids)


def run_experts(layer: RoutedExperts, x: Tensor, topk_weights: Tensor, topk_ids: Tensor) -> Tensor:
    """See :meth:`GPTQMoEMethod.apply`."""
    ids = topk_ids if layer.expert_map is None else layer.expert_map[topk_ids.long()]  # -1: on another rank
    if layer.apply_router_weight_on_input:
        if topk_ids.shape[1] != 1:
            raise ConfigError(
                f"{layer.layer_name}: router weights on the input are defined for one expert per token, "
                f"not for {topk_ids.shape[1]}"
            )
        x, topk_weights = x * topk_weights.to(x.dtype), torch.ones_like(topk_weights)
    routing = Routing(ids, layer.local_num_experts)
    hidden = layer.w13(x, routing, ids.shape[1])
    width = hidden.shape[1] // 2 if layer.activation.is_gated else hidden.shape[1]
    activated = hidden.new_empty(hidden.shape[0], width)
    apply_moe_activation(layer.activation, activated, hidden, activation_config=layer.quant_method.activation_config)
    by_slot = layer.w2(activated, routing, 1).unflatten(0, ids.shape)
    return (by_slot.float() * topk_weights.float().unsqueeze(-1)).sum(1).to(x.dtype)


class _IncomingExperts:
    """The stored layers of the experts of one layer while vLLM loads them.

    Args:
        layer, config: see :class:`GPTQMoEMethod`.
        sizes: hidden size, and intermediate size on this rank.
        dtype: of the model.
    """

    def __init__(
        self, layer: RoutedExperts, config: GPTQBackendConfig, sizes: tuple[int, int], dtype: torch.dtype
    ) -> None:
        self.layer, self.dtype, self.intermediate = layer, dtype, sizes[1]
        parallel = layer.moe_config.moe_parallel_config
        self._rank = parallel.tp_rank
        whole = sizes[1] * parallel.tp_size
        self._projections = {"w1": layer.ckpt_gate_proj_name, "w2": layer.ckpt_down_proj_name}
        if layer.moe_config.is_act_and_mul:
            self._projections["w3"] = layer.ckpt_up_proj_name
        self.first_shards = tuple(shard for shard in ("w1", "w3") if shard in self._projections)
        up, down = Use(sizes[0], whole, False), Use(whole, sizes[0], False)
        globally = range(layer.global_num_experts)
        self._experts = {i: layer.expert_map_manager.map_global_to_local(i) for i in globally}
        uses = {
            self._name(i, shard): down if shard == "w2" else up
            for i, local in self._experts.items()
            if local != -1
            for shard in self._projections
        }
        self._arrivals = Arrivals(config, uses)
        self._pieces: dict[tuple[int, str], AnyPiece] = {}
        self._keys = {
            self._name(i, shard): (local, shard) for i, local in self._experts.items() for shard in self._projections
        }
        dtypes = config.dtypes(next(iter(uses)))
        for rename in ("w13_{}", "w2_{}"):
            add_parameters(layer, self.receive, dtypes, rename)
        self._device = layer.w13_qweight.device

    def receive(
        self,
        part: str,
        tensor: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Take one tensor from vLLM's loader, unless the expert is another rank's."""
        ours = self._experts.get(expert_id, -1) != -1
        if ours:
            name = self._name(expert_id, shard_id)
            if (piece := self._arrivals.add(name, part, tensor)) is not None:
                self._place(name, piece)
        return ours if return_success else None

    def piece(self, expert: int, shard: str) -> AnyPiece:
        """Projection ``shard`` of this rank's expert number ``expert``.

        Raises:
            CheckpointError: it is not in the checkpoint.
        """
        for name, piece in self._arrivals.rest():
            self._place(name, piece)
        if (expert, shard) not in self._pieces:
            raise missing(next(name for name, key in self._keys.items() if key == (expert, shard)))
        return self._pieces.pop((expert, shard))

    def _name(self, expert: int, shard: str) -> str:
        return f"{self.layer.layer_name}.{expert}.{self._projections[shard]}"

    def _place(self, name: str, piece: AnyPiece) -> None:
        expert, shard = self._keys[name]
        first = self._rank * self.intermediate
        if shard == "w2":
            piece = piece.inputs(first, self.intermediate)
        else:
            piece = piece.outputs(torch.arange(first, first + self.intermediate))
        self._pieces[expert, shard] = piece.to(self._device)


def _encoded(layer_name: str) -> str | LayerName:
    return LayerName(layer_name) if LayerNameType is LayerName else layer_name


def _experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: LayerNameType) -> Tensor:
    name = layer_name.value if isinstance(layer_name, LayerName) else layer_name
    layer = get_forward_context().no_compile_layers[name].routed_experts
    return run_experts(layer, x, topk_weights, topk_ids)


def _experts_fake(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: LayerNameType) -> Tensor:
    return torch.empty_like(x)


_library = torch.library.Library("gptq_vllm", "FRAGMENT")
direct_register_custom_op("experts", _experts, fake_impl=_experts_fake, target_lib=_library)
