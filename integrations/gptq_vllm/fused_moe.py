"""Quantized experts of a vLLM mixture-of-experts layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from gptq_backend import ConfigError
from gptq_backend.format import ExpertLayout
from gptq_backend.kernels import Routing

from .compat import (
    ApplyMoEActivationConfig,
    FusedMoEMethodBase,
    FusedMoEQuantConfig,
    LayerName,
    LayerNameType,
    RoutedExperts,
    apply_moe_activation,
    apply_moe_activation_supported,
    direct_register_custom_op,
    get_current_vllm_config_or_none,
    get_forward_context,
)
from .experts import Experts
from .held_weight import hold
from .linear import announce, follow_model
from .pieces import AnyPiece
from .stored_layers import ExpectedLayer, StoredLayers
from .tensor_collector import TensorCollector, add_parameters, missing, remove_parameters

_TEMPLATES = ("w13_{}", "w2_{}")  # names by which vLLM looks for the parameters of experts


def expert_layout(layer: RoutedExperts) -> ExpertLayout:
    """By the names that vLLM looks for."""
    names = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name]
    return ExpertLayout(tuple(f"{{}}.{name}" for name in names if name is not None))


class GPTQMoEMethod(FusedMoEMethodBase):
    """Experts of which at least one projection is quantized; each may have a spec of its own. There is one method per
    layer.

    Raises:
        ConfigError: experts that vLLM or this package cannot multiply.
    """

    def __init__(self, stored: StoredLayers, layer: RoutedExperts) -> None:
        super().__init__(layer.moe_config)
        self.stored = stored
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
        self._prefix, self._dtype, self._intermediate = layer.layer_name, params_dtype, intermediate_size_per_partition
        self._local, self._fixed = layer.local_num_experts, follow_model(self.stored)
        parallel = layer.moe_config.moe_parallel_config
        self._first = parallel.tp_rank * self._intermediate
        whole = parallel.tp_size * self._intermediate
        self._shards = {"w1": layer.ckpt_gate_proj_name, "w3": layer.ckpt_up_proj_name, "w2": layer.ckpt_down_proj_name}
        if not layer.moe_config.is_act_and_mul:
            del self._shards["w3"]
        up, down = ExpectedLayer(hidden_size, whole), ExpectedLayer(whole, hidden_size)
        self._keys: dict[str, tuple[int, str]] = {}  # this rank's number and the shard, by vLLM's name
        for expert in range(layer.global_num_experts):
            if (local := layer.expert_map_manager.map_global_to_local(expert)) != -1:
                self._keys |= {self._name(expert, shard): (local, shard) for shard in self._shards}
        layers = {name: down if shard == "w2" else up for name, (_, shard) in self._keys.items()}
        self._placed: dict[tuple[int, str], AnyPiece] = {}
        self._collector = TensorCollector(self.stored, layers, self._place, self._placed.clear, len(_TEMPLATES))
        for template in _TEMPLATES:
            add_parameters(layer, self._load, self.stored.checkpoint.parts(next(iter(layers))), template)
        self._device = layer.w13_qweight.device

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        with self._collector.finished(layer):
            for template in _TEMPLATES:
                remove_parameters(layer, template)
            # vLLM would do this on the first call, which a compiled graph does not make.
            self.moe_quant_config = self.get_fused_moe_quant_config(layer)
            self.activation_config = ApplyMoEActivationConfig.from_configs(layer.moe_config, self.moe_quant_config)
            for name, shards in (("w13", [shard for shard in self._shards if shard != "w2"]), ("w2", ["w2"])):
                experts = Experts(self._weights(shards), self._dtype, self.stored.backend, " and ".join(shards))
                hold(layer, name, experts, self._fixed)
                announce(experts.describe())
        self.stored.report.loaded(self, layer.w13.kernels | layer.w2.kernels)

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

    def _load(
        self,
        part: str,
        param: Tensor,
        tensor: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Take one tensor from vLLM's loader, unless the expert is another rank's."""
        name = self._name(expert_id, shard_id)
        if name in self._keys:
            self._collector.receive(param, name, part, tensor)
        return name in self._keys if return_success else None

    def _name(self, expert: int, shard: str) -> str:
        return f"{self._prefix}.{expert}.{self._shards[shard]}"

    def _place(self, name: str, weight: AnyPiece) -> None:
        """Keep what this rank needs of a stored layer."""
        expert, shard = self._keys[name]
        if shard == "w2":
            weight = weight.inputs(self._first, self._intermediate)
        else:
            weight = weight.outputs(torch.arange(self._first, self._first + self._intermediate))
        self._placed[expert, shard] = weight.to(self._device)

    def _weights(self, shards: list[str]) -> Iterator[list[AnyPiece]]:
        """What was placed of each expert of this rank in turn; this forgets it.

        Raises:
            CheckpointError: a projection is missing.
        """
        for name, key in self._keys.items():
            if key[1] in shards and key not in self._placed:
                raise missing(name)
        for expert in range(self._local):
            yield [self._placed.pop((expert, shard)) for shard in shards]


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


def _encoded(layer_name: str) -> str | LayerName:
    return LayerName(layer_name) if LayerNameType is LayerName else layer_name


def _experts(x: Tensor, topk_weights: Tensor, topk_ids: Tensor, layer_name: LayerNameType) -> Tensor:
    name = layer_name.value if isinstance(layer_name, LayerName) else layer_name
    layer = get_forward_context().no_compile_layers[name].routed_experts
    return run_experts(layer, x, topk_weights, topk_ids)


_library = torch.library.Library("gptq_vllm", "FRAGMENT")
direct_register_custom_op("experts", _experts, fake_impl=lambda x, *_: torch.empty_like(x), target_lib=_library)
