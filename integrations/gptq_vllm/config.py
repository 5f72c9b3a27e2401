"""The quantization config that vLLM builds from a checkpoint's ``quantization_config``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.logger import init_logger
from vllm.model_executor.layers.fused_moe import RoutedExperts, UnquantizedFusedMoEMethod
from vllm.model_executor.layers.linear import LinearBase, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig, QuantizeMethodBase
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.weight_utils import download_weights_from_hf
from vllm.model_executor.models.utils import WeightsMapper

from gptq_backend import KERNELS, ConfigError, QuantizeConfig, StoredSpec
from gptq_backend.format import TGI_TENSORS, ExpertLayout, TensorFile, TensorInfo, read_tensor, resolve_specs

from . import who_serves as choice
from .checkpoint import PARTS, Checkpoint, Use

logger = init_logger(f"vllm.{__name__}")

KERNEL_VARIABLE = "GPTQ_BACKEND_KERNEL"
HEAD = "lm_head"


class GPTQBackendConfig(QuantizationConfig):
    """Which layers of a model are quantized and how; the checkpoint's headers decide, ``settings`` only helps.

    Args:
        settings: the checkpoint's ``quantization_config``.

    Raises:
        ConfigError: settings that cannot be served, or an unknown kernel in ``GPTQ_BACKEND_KERNEL``.
    """

    def __init__(self, settings: dict[str, Any]) -> None:
        super().__init__()
        self.full_config = settings
        self.settings = QuantizeConfig.from_dict(settings)
        self.backend = _requested_kernel()
        self._checkpoint: Checkpoint | None = None
        self._model: tuple[str, Any, str | None] | None = None
        self._renamings: list[WeightsMapper] = []
        self._uses: dict[str, Use] = {}
        self._specs: dict[str, StoredSpec] | None = None

    # -- what vLLM asks of every config ----------------------------------------------------------------------------

    def get_name(self) -> str:
        """What vLLM's own tables, such as those of its performance metrics, know the method by."""
        return "gptq"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.half, torch.float32]

    @classmethod
    def get_min_capability(cls) -> int:
        return 60

    @staticmethod
    def get_config_filenames() -> list[str]:
        return ["quantize_config.json"]

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> GPTQBackendConfig:
        return cls(config)

    @classmethod
    def override_quantization_method(
        cls, hf_quant_cfg: dict[str, Any], user_quant: str | None, hf_config: Any = None
    ) -> str | None:
        """``gptq``, under which this class is registered, when this plugin serves the checkpoint."""
        return "gptq" if choice.serves(hf_quant_cfg, user_quant) else None

    def get_checkpoint_weight_mapper(self) -> WeightsMapper:  # type: ignore[override]
        """Keep ``g_idx``, which the base class drops; drop the scalars of text-generation-inference; call experts as
        the model does.
        """
        names: list[Any] = [_Renaming(self.checkpoint.renamings)] if self.checkpoint.renamings else []
        return WeightsMapper(orig_to_new_renaming=names, orig_to_new_prefix=dict.fromkeys(TGI_TENSORS))

    def apply_vllm_mapper(self, hf_to_vllm_mapper: WeightsMapper) -> None:
        """Called by the model's class, before its layers are built, with the names that it changes."""
        self._renamings.append(hf_to_vllm_mapper)
        if self._checkpoint is not None:
            self._checkpoint.rename(hf_to_vllm_mapper)

    def maybe_update_config(self, model_name: str, hf_config: Any = None, revision: str | None = None) -> None:
        """Read the headers of a local checkpoint: a damaged one stops the server before it starts processes."""
        self._model = (model_name, hf_config, revision)
        if Path(model_name).is_dir():
            self._open(model_name)

    def get_quant_method(self, layer: nn.Module, prefix: str) -> QuantizeMethodBase | None:
        from .fused_moe import GPTQMoEMethod
        from .linear import GPTQHeadMethod, GPTQLinearMethod

        checkpoint = self.checkpoint
        if isinstance(layer, RoutedExperts):
            checkpoint.place_experts(prefix, _expert_layout(layer))
            quantized = checkpoint.quantized_inside(prefix)
            return GPTQMoEMethod(self, layer) if quantized else UnquantizedFusedMoEMethod(layer.moe_config)
        if isinstance(layer, ParallelLMHead):
            return GPTQHeadMethod(self, [prefix]) if checkpoint.is_quantized(prefix) else None
        if not isinstance(layer, LinearBase):
            return None
        names = self.shard_names(prefix)
        found = [checkpoint.is_quantized(name) for name in names]
        if not any(found):
            if checkpoint.is_quantized(prefix):  # a fused layer that also is one in the file, as Phi-3 has it
                return GPTQLinearMethod(self, [prefix])
            # Nothing known under these names: a model that renames in its loader. What arrives will tell.
            if None not in found or self.settings.for_module(prefix) is None:
                return UnquantizedLinearMethod()
        return GPTQLinearMethod(self, names)

    # -- what this package's methods ask -----------------------------------------------------------------------------

    @property
    def checkpoint(self) -> Checkpoint:
        """The checkpoint's headers. One in the hub is fetched first, where vLLM's loader will look for it."""
        if self._checkpoint is None:
            if self._model is None:
                raise ConfigError("vLLM did not tell where the model is; this version of vLLM is not supported")
            name, _, revision = self._model
            load = get_current_vllm_config().load_config
            self._open(download_weights_from_hf(name, load.download_dir, ["*.safetensors", "*.bin"], revision))
        assert self._checkpoint is not None
        return self._checkpoint

    def _open(self, folder: str) -> None:
        self._checkpoint = checkpoint = Checkpoint(folder, self.full_config)
        for renaming in self._renamings:
            checkpoint.rename(renaming)
        hf_config = self._model[1] if self._model else None
        if f"{HEAD}.qweight" in checkpoint.manifest and getattr(hf_config, "tie_word_embeddings", False):
            logger.info("%s is quantized, so it is not the embedding, though config.json ties them", HEAD)
            hf_config.tie_word_embeddings = False  # else models take the embedding and never ask for a head
        fused = [name for name in checkpoint.manifest if name.endswith("query_key_value.qweight")]
        if fused and getattr(hf_config, "model_type", None) == "bloom":
            raise ConfigError(
                f"{fused[0]}: vLLM's Bloom sorts the rows of this layer as if it were dense, so that it cannot be "
                "served quantized; use transformers, or quantize with query_key_value left in 16 bits"
            )

    def shard_names(self, prefix: str) -> list[str]:
        """vLLM's names, in order, of the layers that are stored separately and fused in the model."""
        parent, _, name = prefix.rpartition(".")
        shards = self.packed_modules_mapping.get(name, [name])
        return [f"{parent}.{shard}" if parent else shard for shard in shards]

    def expect(self, name: str, use: Use) -> None:
        """Announce that the model has a layer for the stored layer ``name``."""
        if (stored := self.checkpoint.stored_name(name)) is not None:
            self._uses[stored] = use

    def stored_parts(self, name: str) -> set[str] | None:
        """Parts of layer ``name`` in the file; None when the file does not have it under a name known here."""
        stored = self.checkpoint.stored_name(name)
        if stored is None:
            return None
        parts = PARTS if f"{stored}.qweight" in self.checkpoint.manifest else ("weight",)
        return {part for part in parts if f"{stored}.{part}" in self.checkpoint.manifest}

    def dtypes(self, name: str) -> dict[str, torch.dtype | None]:
        """Dtypes in the file of the parts of layer ``name``; empty when it is not known."""
        stored, manifest = self.checkpoint.stored_name(name), self.checkpoint.manifest
        parts = (*PARTS, "weight")
        return {part: manifest[f"{stored}.{part}"].dtype for part in parts if f"{stored}.{part}" in manifest}

    def spec(self, name: str, use: Use, tensors: dict[str, Tensor]) -> tuple[StoredSpec, Tensor | None]:
        """Spec of layer ``name``, and its bias if the model does not know of one that is not zero.

        Raises:
            CheckpointError: its tensors do not fit together or to the model.
        """
        stored = self.checkpoint.stored_name(name)
        if stored is None:
            infos = {
                f"{name}.{part}": TensorInfo(
                    tensor.dtype, tuple(tensor.shape), TensorFile(self.checkpoint.folder), f"{name}.{part}"
                )
                for part, tensor in tensors.items()
            }
            out_features = use.out_features or tensors["qweight"].shape[-1]
            return resolve_specs(infos, self.settings, {name: (use.in_features, out_features)})[name], None
        if self._specs is None:  # all at once: what is wrong with a config is wrong for many layers, and said once
            self._specs = self.checkpoint.resolve(self._uses, self.settings)
        spec = self._specs[stored]
        bias = read_tensor(self.checkpoint.manifest[f"{stored}.bias"]) if spec.has_bias and not use.biased else None
        return spec, bias


def _expert_layout(layer: RoutedExperts) -> ExpertLayout:
    """By the names that vLLM looks for."""
    names = [layer.ckpt_gate_proj_name, layer.ckpt_up_proj_name, layer.ckpt_down_proj_name]
    return ExpertLayout(tuple(f"{{}}.{name}" for name in names if name is not None))


class _Renaming:
    """What vLLM's mapper takes for a renaming of transformers: here a table."""

    def __init__(self, names: dict[str, str]) -> None:
        self.names = names

    def rename_source_key(self, key: str) -> tuple[str, None]:
        return self.names.get(key, key), None


def _requested_kernel() -> str | None:
    name = os.environ.get(KERNEL_VARIABLE) or None
    rows = [kernel.name for kernel in KERNELS]
    if name not in (None, "auto", *rows):
        raise ConfigError(f"{KERNEL_VARIABLE}={name} is not a kernel; choose 'auto' or one of {rows}, or unset it")
    return name
