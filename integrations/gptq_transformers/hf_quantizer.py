"""What transformers calls while it loads a model with ``quant_method: gptq``, quantized already or not yet."""

from __future__ import annotations

import dataclasses
import logging
import sys
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import PretrainedConfig
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationMethod

from gptq_backend import CheckpointError, ConfigError, QuantizeConfig
from gptq_backend.format import checkpoint_files, read_json, read_manifest

from .changes import allow_changes, dequantize
from .config import GPTQConfig
from .experts.conversions import drop_fused_conversions, keep_packed_names
from .experts.unfuse import group_experts
from .head import quantize_head
from .loading.checkpoint_names import checkpoint_names
from .loading.checks import check_loaded
from .loading.finish import finish_model
from .loading.newer_config import adopt_newer
from .loading.prepare import LoadPlan, follow_renaming, prepare_model
from .loading.skeleton import check_size
from .quantized_layers import quant_linears, tied_names, untie_quantized
from .versions import changed, warn_of_newer

logger = logging.getLogger(__name__)

# What _from_pretrained_locals looks for.
_LOCALS = (
    "checkpoint_files", "config", "device_mesh", "distributed_config", "gguf_file", "ignore_mismatched_sizes",
    "key_mapping", "pretrained_model_name_or_path", "state_dict", "subfolder", "tp_plan", "use_safetensors", "variant",
)  # fmt: skip


class GPTQBackendQuantizer(HfQuantizer):
    """Serves ``GPTQConfig`` with QuantLinear; needs neither optimum nor gptqmodel.

    Args:
        quantization_config: ours, or transformers' own ``GPTQConfig`` as users build it.
    """

    pre_quantized: bool
    requires_calibration = False
    requires_parameters_quantization = False
    required_packages = None

    def __init__(self, quantization_config: Any, **kwargs: Any) -> None:
        super().__init__(GPTQConfig.adopt(quantization_config), **kwargs)
        self._plan: LoadPlan | None = None
        self._loading: Any = None
        self._renamings: list[Any] = []  # of experts, for transformers 5

    # -- before loading --------------------------------------------------------------------------------------------

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Refuse what cannot work before anything large is read.

        Raises:
            ConfigError: unknown backend, bad settings, tensor parallelism, or nothing to calibrate with.
            CheckpointError: a damaged file.
        """
        warn_of_newer()
        _ = self.quantization_config.kernel
        self.quantization_config.to_quantize_config()
        caller = _from_pretrained_locals()
        parallel = caller.get("distributed_config")
        asked = (caller.get("tp_plan"), caller.get("device_mesh"), getattr(parallel, "tp_plan", None))
        if getattr(parallel, "tp_size", None) not in (None, 1) or any(each is not None for each in asked):
            raise ConfigError(
                "tp_plan is not supported for GPTQ checkpoints, because transformers would cut the packed weights in "
                "the wrong dimension; leave it out, use device_map, or serve the model with vLLM"
            )
        if isinstance(config := caller.get("config"), PretrainedConfig):
            adopt_newer(config)
        if not self.pre_quantized:
            self.quantization_config.require_run()
        elif (folder := _local_folder(caller)) is not None:
            # Before transformers builds the model and opens files: what they claim may be anything.
            manifest = read_manifest(checkpoint_files(folder))
            check_size(read_json(folder / "config.json"), manifest)

    def _process_model_before_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self.pre_quantized:
            caller = _from_pretrained_locals()
            files = kwargs.get("checkpoint_files") or caller.get("checkpoint_files")
            if not files:
                raise CheckpointError(
                    "a GPTQ checkpoint can only be loaded from files, since their headers tell which layers are "
                    "quantized; save the state dict to a folder and pass that"
                )
            config, stored = self.quantization_config, read_manifest(files)
            with torch.device("cpu"):  # transformers calls this under torch.device("meta")
                self._plan = prepare_model(
                    model,
                    stored,
                    config.to_quantize_config(),
                    checkpoint_names(model, stored, caller.get("key_mapping")),
                    config.kernel,
                    bool(caller.get("ignore_mismatched_sizes")),
                )
            self._renamings = follow_renaming(model, self._plan)
        allow_changes(model)
        self._loading = model
        return model

    def update_weight_conversions(self, weight_conversions: list[Any], model: Any = None) -> list[Any]:
        """For transformers 5: leave out the fusing of experts that are quantized one by one."""
        model = model if model is not None else self._loading
        if not self.pre_quantized or model is None:
            return weight_conversions
        return [*drop_fused_conversions(weight_conversions, model), *self._renamings]

    def update_missing_keys(self, model: Any, missing_keys: list[str], prefix: str) -> list[str]:
        """For transformers 4: the names that it did not find and is about to fill with random values."""
        if self._plan is None:
            return missing_keys
        later = set(self._plan.dense)  # and what is tied to those
        tied = tied_names(model) if later else ()
        missing_keys = [key for key in missing_keys if key.removesuffix(".weight") not in later and key not in tied]
        check_loaded(model, missing_keys)
        return missing_keys

    # -- after loading ---------------------------------------------------------------------------------------------

    def _process_model_after_weight_loading(self, model: Any, **kwargs: Any) -> Any:
        if self._plan is not None:
            finish_model(model, self._plan)
        elif not self.pre_quantized:
            from .quantize_on_load import quantize_loaded

            quantize_loaded(model, self.quantization_config)
            keep_packed_names(model)
            self.quantization_config.forget_run()
            self.pre_quantized = True
        # This object stays with the model, also in copies and pickles: nothing of the loading belongs there.
        self._plan, self._loading, self._renamings = None, None, []
        model.config.quantization_config = self.quantization_config
        if (bits := self.quantization_config.quantize_head) is not None:
            quantize_head(model, bits)
        if self.quantization_config.fuse is not False:
            _fuse(model)
        return model

    def dequantize(self, model: Any, dtype: torch.dtype | None = None) -> Any:
        """For ``model.dequantize()``; see :func:`dequantize.dequantize`."""
        dequantize(model, dtype)
        return model

    def is_serializable(self, safe_serialization: bool | None = None) -> bool:
        return True

    @property
    def is_trainable(self) -> bool:
        return True

    @property
    def is_compileable(self) -> bool:
        return True


def attach(model: Any, config: QuantizeConfig) -> None:
    """Mark a ``PreTrainedModel``, whose layers are QuantLinear already, as quantized, and let it run fast, for which
    all weights come into memory.
    """
    mark_quantized(model, config)
    group_experts(model)
    _fuse(model)


def mark_quantized(model: Any, config: QuantizeConfig) -> None:
    """Let a ``PreTrainedModel``, whose layers are QuantLinear already, be saved as what it is."""
    if any(layer.stored_spec.planar for _, layer in quant_linears(model)):  # also where that is the run's own choice
        config = dataclasses.replace(config, checkpoint_format="gptq_p")
    quantizer = GPTQBackendQuantizer(GPTQConfig.from_quantize_config(config), pre_quantized=True)
    model.hf_quantizer = quantizer
    model.is_quantized = True
    model.quantization_method = QuantizationMethod.GPTQ
    model.config.quantization_config = quantizer.quantization_config
    untie_quantized(model)
    allow_changes(model)
    keep_packed_names(model)


def _fuse(model: Any) -> None:
    try:
        from .fused import fuse_layers  # needs all of transformers' modeling, which may be what imports this
    except ImportError as error:
        logger.warning("decoder layers run module by module: %s", changed(error))
    else:
        fuse_layers(model)


def _local_folder(caller: dict[str, Any]) -> Path | None:
    """The folder whose files are about to be read in the usual way; None for the hub and for arguments that choose."""
    if any(caller.get(key) is not None for key in ("variant", "gguf_file", "state_dict", "use_safetensors")):
        return None
    subfolder = caller.get("subfolder") or ""
    folder = Path(str(caller.get("pretrained_model_name_or_path")), subfolder)
    return folder if folder.is_dir() and (folder / "config.json").is_file() else None


def _from_pretrained_locals() -> dict[str, Any]:
    """What the ``from_pretrained`` that is calling us knows and does not pass on.

    transformers 4 resolves the checkpoint's files (cache, revision, subfolder, variant) and keeps them to itself, and
    no version hands over ``key_mapping`` or the tensor-parallel arguments. They are locals of a caller.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        if code.co_name == "from_pretrained" and Path(code.co_filename).name == "modeling_utils.py":
            return {name: frame.f_locals.get(name) for name in _LOCALS}
        frame = frame.f_back
    return {}
