"""Quantized experts of a vLLM mixture-of-experts layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from gptq_backend import ConfigError
from gptq_backend.format import ExpertLayout, by_gptqmodel
from gptq_backend.kernels import Routing

from .compat import (
    ApplyMoEActivationConfig,
    FusedMoEMethodBase,
    FusedMoEQuantConfig,
    LayerName,
    LayerNameType,
    RoutedExperts,
    direct_register_custom_op,
    get_current_vllm_config_or_none,
    get_forward_context,
)
from .expert_activation import ALTERNATING, activate, supported
from .expert_shards import FirstProduct, shards
from .experts import Experts
from .held_weight import hold
from .linear import announce, finish_loading, follow_model
from .pieces import AnyPiece
from .stored_layers import ExpectedLayer, StoredLayers
from .tensor_collector import TensorCollector, add_parameters, missing, remove_parameters

# What vLLM's loaders look for. Most ask for our names, and some of those know a g_idx only as vLLM's own methods call
# it, see ``place_experts``; loaders of drafts that do not ask bring the file's.
_NAMES_OF_VLLM = ("w13_{}", "w2_{}", "w13_weight_{}", "w2_weight_{}")


def _own_name(expert: int | str, shard: str, part: str) -> str:
    """Of a parameter, where they look for none that an expert's tensors could go to."""
    return f"expert_{expert}_{shard}_{part}"


def find_experts(stored: StoredLayers, layer: RoutedExperts) -> ExpertLayout | None:
    """Let vLLM's loader find the experts of ``layer`` in the checkpoint -> where it has them, if they are for
    :class:`GPTQMoEMethod`.
    """
    checkpoint, module = stored.checkpoint, layer.layer_name
    if _loaded_whole(layer):
        layout = checkpoint.expert_layout(module)
        if layout is not None:
            starts = {path: f"routed_experts.{_own_name('{}', shard, '')}" for shard, path in shards(layout).items()}
            checkpoint.name_experts(module, starts)
        return layout
    names = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name]
    layout = ExpertLayout(tuple(f"{{}}.{name}" for name in names if name is not None))
    checkpoint.place_experts(module, layout)
    return layout if checkpoint.quantized_inside(module) else None


def _loaded_whole(layer: RoutedExperts) -> bool:
    """Whether the model's loader knows tensors of all experts only. So it is in gpt-oss, the one model whose experts
    have biases: of another tensor it looks for a parameter of that very name, and skips what it does not find.
    """
    return bool(layer.moe_config.has_bias)


class GPTQMoEMethod(FusedMoEMethodBase):
    """Experts of which at least one projection is quantized; each may have a spec of its own. There is one method per
    layer.

    Args:
        layout: where the checkpoint has them, see :func:`find_experts`.

    Raises:
        ConfigError: experts that vLLM or this package cannot multiply.
    """

    def __init__(self, stored: StoredLayers, layer: RoutedExperts, layout: ExpertLayout) -> None:
        super().__init__(layer.moe_config)
        self.stored, self._shards = stored, shards(layout)
        vllm_config = get_current_vllm_config_or_none()
        if vllm_config is not None and vllm_config.lora_config is not None:
            # vLLM would wrap the experts even where no adapter touches them, and fail on kernels that are not its own.
            raise ConfigError(
                "LoRA on a mixture of experts whose experts are quantized is not supported; leave out --enable-lora, "
                "or merge the adapter before quantizing"
            )
        if not supported(layer.activation):
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
        gated, alternating = layer.activation.is_gated, layer.activation.value == ALTERNATING
        self._product = FirstProduct(gated, alternating, whole, self._first, self._intermediate)
        sizes = {"w1": (hidden_size, whole), "w13": (hidden_size, 2 * whole), "w2": (whole, hidden_size)}
        sizes["w3"] = sizes["w1"]
        self._keys: dict[str, tuple[int, str]] = {}  # this rank's number and the shard, by vLLM's name
        self._sets: list[tuple[Callable[[str], str], Callable[..., Any]]] = []  # of empty parameters: name, loader
        for expert in range(layer.global_num_experts):
            if (local := layer.expert_map_manager.map_global_to_local(expert)) != -1:
                for shard in self._shards:
                    name = self._name(expert, shard)
                    self._keys[name] = (local, shard)
                    self._sets.append((partial(_own_name, expert, shard), partial(self._load, name)))
        if not _loaded_whole(layer):
            self._sets = [(template.format, self._load_of_vllm) for template in _NAMES_OF_VLLM]
        layers = {name: ExpectedLayer(*sizes[shard]) for name, (_, shard) in self._keys.items()}
        self._placed: dict[tuple[int, str], AnyPiece | None] = {}  # None: of that layer this rank needs nothing
        self._collector = TensorCollector(self.stored, layers, self._place, self._placed.clear, len(self._sets))
        for called, load in self._sets:
            add_parameters(layer, load, self.stored.checkpoint.parts(next(iter(layers))), called)
        self._device = torch.empty(0).device  # vLLM builds a model with its device as the default

    def process_weights_after_loading(self, layer: RoutedExperts) -> None:
        with self._collector.finished(layer):
            for called, _ in self._sets:
                remove_parameters(layer, called)
            # vLLM would do this on the first call, which a compiled graph does not make.
            self.moe_quant_config = self.get_fused_moe_quant_config(layer)
            self.activation_config = ApplyMoEActivationConfig.from_configs(layer.moe_config, self.moe_quant_config)
            before = [shard for shard in self._shards if shard != "w2"]
            for name, stored in (("w13", before), ("w2", ["w2"])):
                order = self._product.order(before, self._halves) if stored is before else None
                experts = Experts(self._weights(stored), self._dtype, self.stored.backend, " and ".join(stored), order)
                hold(layer, name, experts, self._fixed)
                announce(experts.describe())
        finish_loading(self.stored, self, layer.w13.kernels | layer.w2.kernels)

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

    def _load(self, name: str, part: str, param: Tensor, tensor: Tensor) -> None:
        """Take one tensor of layer ``name``."""
        self._collector.receive(param, name, part, tensor)

    def _load_of_vllm(
        self,
        part: str,
        param: Tensor,
        tensor: Tensor,
        weight_name: str,
        shard_id: str,
        expert_id: int,
        return_success: bool = False,
    ) -> bool | None:
        """Take one tensor from the loader that vLLM has for experts, unless the expert is another rank's."""
        name = self._name(expert_id, shard_id)
        if name in self._keys:
            self._load(name, part, param, tensor)
        return name in self._keys if return_success else None

    def _name(self, expert: int, shard: str) -> str:
        return f"{self._prefix}.{self._shards[shard].format(expert)}"

    @property
    def _halves(self) -> bool:
        """See :class:`ExpertLayout`; another one may come with a reload."""
        return by_gptqmodel(self.stored.settings)

    def _place(self, name: str, weight: AnyPiece) -> None:
        """Keep what this rank needs of a stored layer."""
        expert, shard = self._keys[name]
        self._placed[expert, shard] = None
        if shard == "w2":
            self._placed[expert, shard] = weight.inputs(self._first, self._intermediate).to(self._device)
        elif len(rows := self._product.rows(shard, self._halves)):
            self._placed[expert, shard] = weight.outputs(rows).to(self._device)

    def _weights(self, stored: list[str]) -> Iterator[list[AnyPiece]]:
        """What was placed of each expert of this rank in turn; this forgets it.

        Raises:
            CheckpointError: a projection is missing.
        """
        for name, key in self._keys.items():
            if key[1] in stored and key not in self._placed:
                raise missing(name)
        for expert in range(self._local):
            pieces = [self._placed.pop((expert, shard)) for shard in stored]
            yield [piece for piece in pieces if piece is not None]


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
    activated = activate(layer.activation, hidden, layer.quant_method.activation_config)
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
