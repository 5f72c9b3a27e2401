"""What vLLM asks of a quantization config while it builds a model."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from torch import nn

from gptq_backend import KERNELS, ConfigError, QuantizeConfig
from gptq_backend.format import TGI_TENSORS

from .checkpoint import Checkpoint
from .compat import (
    LinearBase,
    ParallelLMHead,
    QuantizeMethodBase,
    RoutedExperts,
    UnquantizedFusedMoEMethod,
    UnquantizedLinearMethod,
    VocabParallelEmbedding,
    WeightsMapper,
    download_weights_from_hf,
    get_current_vllm_config,
)
from .embedding import embedding_method, tied_method
from .fused_moe import GPTQMoEMethod, find_experts
from .linear import GPTQHeadMethod, GPTQLinearMethod
from .method_facts import MethodFacts
from .stored_layers import StoredLayers

KERNEL_VARIABLE = "GPTQ_BACKEND_KERNEL"


class GPTQBackendConfig(MethodFacts):
    """Which layers of a model are quantized and how; the checkpoint's headers decide, ``settings`` only helps.

    Raises:
        ConfigError: settings that cannot be served, or an unknown kernel in ``GPTQ_BACKEND_KERNEL``.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.full_config = settings
        self.settings = QuantizeConfig.from_dict(settings)
        self._backend = _requested_kernel()
        self._models: list[StoredLayers] = []  # the target, then drafts that share its config
        self._model: tuple[str, Any, str | None] | None = None  # name, its config, revision
        self._mappers: list[WeightsMapper] = []  # of names, that arrived before the checkpoint was opened

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GPTQBackendConfig:
        return cls(config)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the headers of a local checkpoint: a damaged one stops the server before it starts processes."""
        self._model = (model_name, hf_config, revision)
        if Path(model_name).is_dir():
            self._models = [self._opened(model_name)]

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Called by the model's class, before its layers are built, with the names that it changes."""
        if self._models:
            self.stored.checkpoint.rename(hf_to_vllm_mapper)
        else:
            self._mappers.append(hf_to_vllm_mapper)

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:
        """Keep ``g_idx``, which the base class drops; drop the scalars of text-generation-inference; call experts as
        the model does.
        """
        # vLLM expects renamings of transformers here, of which it calls this.
        ours = SimpleNamespace(rename_source_key=lambda key: (self._renamed(key), None))
        return WeightsMapper(orig_to_new_renaming=[ours], orig_to_new_prefix=dict.fromkeys(TGI_TENSORS))

    def _renamed(self, key: str) -> str:
        """What the model calls tensor ``key`` of the file. No tensor has new names in two models."""
        for stored in self._models:
            stored.current_reload()  # which may bring other names, and begins with a name
        tables = (stored.checkpoint.renamings for stored in self._models)
        return next((table[key] for table in tables if key in table), key)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        method = self._method(layer, prefix)
        if isinstance(method, GPTQLinearMethod | GPTQMoEMethod):
            self.stored.report.expect(method)
            self.stored.fused.watch()
        return method

    def _method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        stored = self.stored
        if isinstance(layer, RoutedExperts):
            layout = find_experts(stored, layer)
            return GPTQMoEMethod(stored, layer, layout) if layout else UnquantizedFusedMoEMethod(layer.moe_config)
        if isinstance(layer, ParallelLMHead):
            own = stored.checkpoint.is_quantized(prefix)
            return GPTQHeadMethod(stored, [prefix]) if own else tied_method(stored, layer, prefix)
        if isinstance(layer, VocabParallelEmbedding):
            return embedding_method(stored, layer, prefix)
        if not isinstance(layer, LinearBase):
            return None
        names = stored.names(prefix, self.packed_modules_mapping)
        return GPTQLinearMethod(stored, names) if names else UnquantizedLinearMethod()

    @property
    def stored(self) -> StoredLayers:
        """The checkpoint's layers, as the model uses them that vLLM is building."""
        if not self._models:
            self._models = [self._opened(self._fetched())]
        elif self._models[-1].report.begun:
            # That one is built, and its weights are loaded: this is its draft, which has other names.
            self._models.append(self._models[-1].for_another_model())
        return self._models[-1]

    def _fetched(self) -> str:
        """The folder of a checkpoint in the hub, where vLLM's loader will look for it."""
        if self._model is None:
            raise ConfigError("vLLM did not tell where the model is; this version of vLLM is not supported")
        name, _, revision = self._model
        load = get_current_vllm_config().load_config
        patterns, ignored = ["*.safetensors", "*.bin"], load.ignore_patterns
        return download_weights_from_hf(name, load.download_dir, patterns, revision, ignore_patterns=ignored)

    def _opened(self, folder: str) -> StoredLayers:
        model, hf_config, _ = self._model or (folder, None, None)
        checkpoint = Checkpoint(folder, self.full_config)
        for mapper in self._mappers:
            checkpoint.rename(mapper)
        stored = StoredLayers(checkpoint, self.settings, self._backend, model)
        stored.check_model(hf_config)
        return stored


def _requested_kernel() -> str | None:
    name = os.environ.get(KERNEL_VARIABLE) or None
    rows = [kernel.name for kernel in KERNELS]
    if name not in (None, "auto", *rows):
        raise ConfigError(f"{KERNEL_VARIABLE}={name} is not a kernel; choose 'auto' or one of {rows}, or unset it")
    return name
