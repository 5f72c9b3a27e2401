"""What is converted: a checkpoint of any format that can be read, a layer at a time."""

from __future__ import annotations

import logging
import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_backend import CheckpointError, ConfigError, QuantizedWeight
from gptq_backend.foreign_settings import method_of
from gptq_backend.format import (
    EMBEDDINGS,
    INDEX,
    SETTINGS_FILES,
    TGI_TENSORS,
    dense_embeddings,
    read_json,
    read_tensor,
)

from ..loading.checkpoint_names import checkpoint_names
from ..loading.checks import absent, check_loaded, check_stored
from ..loading.prepare import prepare_model
from ..loading.skeleton import UnknownModel, build_skeleton
from ..merging.base import Base
from ..model_files import copy_companions
from .plain_names import PlainNames, plain_names

logger = logging.getLogger(__name__)

_NOT_COPIED = ("config.json", *SETTINGS_FILES, "quantization_config.json")  # of which the last is AutoRound's
_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", INDEX)
_WIDTHS = ("word_embed_proj_dim", "embedding_size", "hidden_size", "n_embd", "d_model")  # of an embedding


class Source(ABC):
    """Names are those of the file to write.

    Attributes:
        layers: names of the quantized layers.
        embeddings: those of them that are embeddings of tokens.
        settings: of the checkpoint, if GPTQ made it, so that what else they say is kept; else {}.
        model_config: content of config.json without settings of a quantization.
        lossy: why the quantized layers that are written differ from those that are read; None if they do not.
        rounded: tensors among the others that were rounded, with the largest difference; filled by :meth:`others`.
    """

    layers: list[str]
    embeddings: Sequence[str] = ()
    settings: Mapping[str, Any]
    model_config: dict[str, Any]
    lossy: str | None = None
    rounded: Mapping[str, float] = {}

    @abstractmethod
    def quantized(self, layer: str) -> QuantizedWeight:
        """The layer's codes, scales, zeros and groups."""

    @abstractmethod
    def dense(self, layer: str) -> Tensor:
        """float32 [N, K]: what the layer's weight is in the source, by its own rule."""

    @abstractmethod
    def bias(self, layer: str) -> Tensor | None:
        """As stored."""

    @abstractmethod
    def others(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors that belong to no quantized layer."""

    def dense_embeddings(self) -> Iterator[tuple[str, Tensor]]:
        """Name of the weight and float32 [vocabulary, width] of each of :attr:`embeddings`."""
        yield from ()

    def plain_names(self) -> PlainNames:
        """Where dense layers go."""
        return PlainNames()

    @abstractmethod
    def dense_layers(self) -> list[str]:
        """Names of matrices that are not quantized."""

    @abstractmethod
    def copy_files(self, folder: Path) -> None:
        """Write the other files of the model (tokenizer and the like) into ``folder``."""


class StoredSource(Source):
    """A checkpoint folder, or one in the hub's cache."""

    def __init__(self, model: str | Path) -> None:
        """Raises ConfigError, CheckpointError: it cannot be read, is not quantized, or does not fit its model."""
        self._base = Base(model, "expected a quantized checkpoint: quantize it (gptq-backend quantize)")
        # Before anything lies beside them.
        self._files = [path for path in self._base.folder.iterdir() if path.is_file()]
        self.layers = [*self._base.specs]
        self.embeddings = [name for name in self.layers if name.rpartition(".")[2] in EMBEDDINGS]
        if not self.layers:
            raise ConfigError(f"{model} has no quantized layer, expected a quantized checkpoint; pass one")
        self.settings = self._base.settings if method_of(self._base.settings) == "gptq" else {}
        self.model_config = read_json(self._base.folder / "config.json")
        for section in (self.model_config, self.model_config.get("text_config")):
            if isinstance(section, dict):
                section.pop("quantization_config", None)
        self._check_fit()

    def _check_fit(self) -> None:
        """Raises CheckpointError where the tensors are not those of the model, as far as transformers has it."""
        base = self._base
        try:
            model = build_skeleton(base.folder, base.manifest)
        except (UnknownModel, CheckpointError) as error:
            logger.warning("whether the tensors are all that the model needs is not known: %s", error)
            return
        plan = prepare_model(model, base.manifest, base.config, checkpoint_names(model, base.manifest))
        check_loaded(model, absent(model, plan.manifest, plan.dense))
        check_stored(plan.dtypes, plan.manifest)

    def dense_embeddings(self) -> Iterator[tuple[str, Tensor]]:
        config = self.model_config
        section = config["text_config"] if isinstance(config.get("text_config"), dict) else config
        width = next((section[key] for key in _WIDTHS if section.get(key)), None)
        if not isinstance(section.get("vocab_size"), int) or not isinstance(width, int):
            raise ConfigError(
                f"config.json of {self._base.folder} has no vocab_size or hidden_size, which tell how "
                f"{self.embeddings[0]} lies; leave embeddings quantized"
            )
        yield from dense_embeddings(self._base.manifest, self._base.config, section["vocab_size"], width, torch.float32)

    def plain_names(self) -> PlainNames:
        return plain_names(self._base.folder, self._base.manifest)

    def quantized(self, layer: str) -> QuantizedWeight:
        return self._base.quantized(layer)

    def dense(self, layer: str) -> Tensor:
        if layer in self._base.specs:
            return self.quantized(layer).dequantize(torch.float32)
        return read_tensor(self._base.manifest[f"{layer}.weight"]).float()

    def bias(self, layer: str) -> Tensor | None:
        info = self._base.manifest.get(f"{layer}.bias")
        return None if info is None else read_tensor(info)

    def others(self) -> Iterator[tuple[str, Tensor]]:
        for key, info in self._base.manifest.items():
            if key.rpartition(".")[0] not in self._base.specs and key not in TGI_TENSORS:
                yield key, read_tensor(info)

    def dense_layers(self) -> list[str]:
        found = (key.removesuffix(".weight") for key, i in self._base.manifest.items() if len(i.shape) == 2)
        return [name for name in found if f"{name}.weight" in self._base.manifest and name not in self._base.specs]

    def copy_files(self, folder: Path) -> None:
        for path in self._files:
            outdated = path.name in _NOT_COPIED or path.name.endswith(_WEIGHTS)
            if not outdated and not path.name.startswith("quantize_report"):
                shutil.copyfile(path, folder / path.name)
        copy_companions(self._base.folder, folder)  # also from folders inside
