"""``GPTQConfig``: transformers' own class, without its need for optimum or gptqmodel; it keeps every key."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
from typing import Any

import torch
from transformers.utils.quantization_config import GPTQConfig as StockGPTQConfig
from transformers.utils.quantization_config import QuantizationMethod

from gptq_autoload.stock_config import LOADING
from gptq_backend import KERNELS, ConfigError, QuantizeConfig, WeightSpec
from gptq_backend.config_fields import held_bits
from gptq_backend.dialects import ALIASES
from gptq_backend.foreign_settings import AWQ_VERSION, gptq_settings, method_of

logger = logging.getLogger(__name__)

# Kernels of GPTQModel, AutoGPTQ and optimum. Code that names them must run unchanged, so they mean 'auto'; those that
# are called as ours are ("cuda", "triton"), where ours cannot run.
_FOREIGN_BACKENDS = frozenset([
    "bitblas", "cuda", "cuda_old", "exllama", "exllama_eora", "exllama_v1", "exllama_v2", "exllama_v3", "exllamav1",
    "exllamav2", "gguf", "hf_kernel", "ipex", "machete", "marlin", "marlin_fp16", "mlx", "qigen", "sglang", "torch",
    "torch_aten", "torch_fused", "torch_int8", "triton", "trainable", "vllm",
])  # fmt: skip
# How to load, not what was stored: saved, they would bind a checkpoint to the machine that wrote it.
_NOT_STORED = (
    *LOADING, AWQ_VERSION, "dataset", "tokenizer", "use_exllama", "exllama_config", "use_cuda_fp16", "max_input_length",
)  # fmt: skip
# What a run of quantizing needs and a reader of its result does not.
_RUN = (
    "batch_size", "block_name_to_quantize", "cache_block_outputs", "model_seqlen", "module_name_preceding_first_block",
    "pad_token_id",
)  # fmt: skip
# Settings that have one type; the others are kept as they were written.
_TYPED = {item.name for item in dataclasses.fields(QuantizeConfig)} - {
    "dynamic", "extra", "modules_in_block_to_quantize",
}  # fmt: skip
# name -> arguments of datasets.load_dataset; only the start of c4 is fetched, its files are large
DATASETS: dict[str, tuple[tuple[str, ...], dict[str, Any]]] = {
    "wikitext2": (("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": "train"}),
    "c4": (("allenai/c4", "en"), {"split": "train", "streaming": True}),
}
DATASETS["c4-new"] = DATASETS["c4"]


class GPTQConfig(StockGPTQConfig):
    """Settings of :class:`gptq_backend.QuantizeConfig` in the form that ``from_pretrained`` expects.

    Args:
        bits, tokenizer, dataset, ...: as in transformers' ``GPTQConfig``.
        backend: row of the kernel table ("reference", "cpu", ...), or "auto". Names of other projects' kernels
            ("marlin", "exllama_v2") are taken as "auto", with a warning.
        fuse: whether decoder layers may run in few calls on a CPU, see :func:`fused.fuse_layers`; True by default.
        quantize_head: 8 or 4 rounds the output embedding to so many bits when the model is loaded; None leaves it.
        **kwargs: every other key of a ``quantization_config`` (``dynamic``, ``lm_head``, ``static_groups``,
            ``pack_dtype``, ``meta``, ...); kept as attributes and written back.

    Raises:
        ConfigError: a value is not supported, or the checkpoint is of another kind.
    """

    def __init__(self, bits: int | None = None, tokenizer: Any = None, dataset: Any = None, **kwargs: Any) -> None:
        kwargs = {key: value for key, value in kwargs.items() if value is not None}
        for alias, key in ALIASES.items():
            if key == "bits" and alias in kwargs:
                value = kwargs.pop(alias)
                bits = value if bits is None else bits
            elif key not in ("checkpoint_format", "quant_method") and alias in kwargs:  # those keep both spellings
                value = kwargs.pop(alias)
                kwargs.setdefault(key, value)
        if (method := method_of(kwargs)) != "gptq":
            raise ConfigError(
                f"GPTQConfig has the settings of {method}, expected those of GPTQ; load such a checkpoint without a "
                "quantization_config of your own"
            )
        read = QuantizeConfig.from_dict(kwargs | ({} if bits is None else {"bits": bits}))
        # The stock class checks how a checkpoint was made, too (damp_percent, the name of the data set), which is not
        # for its reader to judge; it refuses codes of 5 to 7 bits; and it warns of an act_group_aware that it would
        # turn off by itself.
        super().__init__(
            bits=held_bits(read.bits),
            group_size=read.group_size,
            sym=read.sym,
            desc_act=read.desc_act,
            act_group_aware=read.group_aware,
            format=read.checkpoint_format,
            backend=kwargs.pop("backend", None),
        )
        self.bits, self.tokenizer, self.dataset = read.bits, tokenizer, dataset
        self.fuse, self.quantize_head = kwargs.pop("fuse", None), kwargs.pop("quantize_head", None)
        self.checkpoint_format = read.checkpoint_format
        for key, value in kwargs.items():
            if not hasattr(type(self), key) and key not in _RUN and key not in ("format", "quant_method"):
                known = key in _TYPED and key not in read.extra
                setattr(self, key, getattr(read, key) if known else value)
        for key in _RUN:
            setattr(self, key, kwargs.get(key))  # None, which is not written, in place of the stock class's defaults

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """What a checkpoint says. If it names an unknown kernel, it is not refused: another one is chosen."""
        stored = {key: value for key, value in gptq_settings(config_dict).items() if key != "self"}
        name = _kernel_name(stored.get("backend"))
        if name not in (None, *_FOREIGN_BACKENDS, *(row.name for row in KERNELS)):
            del stored["backend"]
        return super().from_dict(stored, return_unused_kwargs, **kwargs)

    @classmethod
    def adopt(cls, config: Any) -> GPTQConfig:
        """``config`` itself if it is ours, else a copy of transformers' own ``GPTQConfig`` object."""
        if isinstance(config, cls):
            return config
        values = {key: value for key, value in vars(config).items() if key not in ("quant_method", "tokenizer")}
        adopted = cls(**copy.deepcopy(values))
        adopted.tokenizer = config.tokenizer
        return adopted

    def require_run(self) -> None:
        """Refuse what an unquantized model cannot be quantized with, before it is loaded.

        Raises:
            ConfigError: no calibration data, a data set that nobody knows, or a setting with an unknown value.
        """
        if self.dataset is None:
            raise ConfigError(
                "this model is not quantized yet, and GPTQConfig has no calibration data to quantize it with; pass "
                "GPTQConfig(..., dataset=[texts], tokenizer=...), or dataset='wikitext2' or 'c4'"
            )
        if isinstance(self.dataset, str) and self.dataset not in DATASETS:
            raise ConfigError(
                f"dataset={self.dataset!r} is not a known data set; choose one of {tuple(DATASETS)}, or pass "
                "dataset=[texts] of your own"
            )
        self.to_quantize_config().check_quantizer_settings()

    def forget_run(self) -> None:
        """Drop what only the quantizing, now done, had a use for."""
        for key in ("dataset", "tokenizer", *_RUN):
            setattr(self, key, None)

    @classmethod
    def from_quantize_config(cls, config: QuantizeConfig) -> GPTQConfig:
        return cls(**config.to_dict())

    def to_quantize_config(self) -> QuantizeConfig:
        """The core's settings; keys that mean nothing there are in its ``extra``."""
        version = getattr(self, AWQ_VERSION, None)  # which only the reading needs
        return QuantizeConfig.from_dict(self.to_dict() | ({} if version is None else {AWQ_VERSION: version}))

    def to_dict(self) -> dict[str, Any]:
        """What is written to config.json, as plain values."""
        values = {
            key: copy.deepcopy(value)
            for key, value in vars(self).items()
            if key not in _NOT_STORED and value is not None and (key, value) != ("keep_edge_blocks", 0)
        }
        values["quant_method"] = QuantizationMethod.GPTQ.value
        values["checkpoint_format"] = self.checkpoint_format
        return values

    def to_diff_dict(self) -> dict[str, Any]:
        """As :meth:`to_dict`; transformers 4 asks for it when it prints a config, and has none."""
        return self.to_dict()

    @property
    def kernel(self) -> str | None:
        """Row of the kernel table that ``backend`` asks for; None chooses.

        Raises:
            ConfigError: nobody has a kernel of that name.
        """
        name, rows = _kernel_name(self.backend), [row.name for row in KERNELS]
        if name is None:
            return None
        if name in rows and not (name in _FOREIGN_BACKENDS and (why := _unusable_here(name))):
            return name
        if name in _FOREIGN_BACKENDS:
            _warn_foreign(name, why if name in rows else "it is a kernel of another library")
            return None
        raise ConfigError(f"backend={name!r} is not a kernel; choose 'auto' or one of {rows}")


def _kernel_name(backend: Any) -> str | None:
    """What ``backend``, a name or a member of somebody's enumeration, is called; None for "auto"."""
    name = "auto" if backend is None else str(getattr(backend, "value", backend)).lower()
    return None if name in ("auto", "auto_trainable") else name  # the last is in transformers' documentation


def _unusable_here(name: str) -> str | None:
    """Why the row of that name serves no device of this machine, not even an ordinary layer; None if it does one."""
    ordinary = WeightSpec(in_features=128, out_features=128, bits=4, group_size=128, groups=1)
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    devices = [torch.device("cpu")] if accelerator is None else [torch.device(accelerator.type, 0), torch.device("cpu")]
    reasons = [row.supports(ordinary, device) for row in KERNELS if row.name == name for device in devices]
    return None if None in reasons else reasons[0]


@functools.cache
def _warn_foreign(name: str, why: str) -> None:
    logger.warning("backend=%r: %s; gptq_backend chooses a kernel itself ('auto')", name, why)
