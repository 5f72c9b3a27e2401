"""What is converted: a checkpoint of any format that can be read, a layer at a time."""

from __future__ import annotations

import shutil
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptq_backend import ConfigError, QuantizedWeight
from gptq_backend.foreign_settings import method_of
from gptq_backend.format import INDEX, SETTINGS_FILES, TGI_TENSORS, read_json, read_tensor

from ..merging.base import Base

_NOT_COPIED = ("config.json", *SETTINGS_FILES, "quantization_config.json")  # of which the last is AutoRound's


class Source(ABC):
    """Names are those of the file to write.

    Attributes:
        layers: names of the quantized layers.
        settings: of the checkpoint, if GPTQ made it, so that what else they say is kept; else {}.
        model_config: content of config.json without settings of a quantization.
        lossy: why the quantized layers that are written differ from those that are read; None if they do not.
        rounded: tensors among the others that were rounded, with the largest difference; filled by :meth:`others`.
    """

    layers: list[str]
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

    @abstractmethod
    def dense_layers(self) -> list[str]:
        """Names of matrices that are not quantized."""

    @abstractmethod
    def copy_files(self, folder: Path) -> None:
        """Write the other files of the model (tokenizer and the like) into ``folder``."""


class StoredSource(Source):
    """A checkpoint folder, or one in the hub's cache."""

    def __init__(self, model: str | Path) -> None:
        """Raises ConfigError, CheckpointError: it cannot be read, or is not quantized."""
        self._base = Base(model)
        self.layers = [*self._base.specs]
        if not self.layers:
            raise ConfigError(f"{model} has no quantized layer, expected a quantized checkpoint; pass one")
        self.settings = self._base.settings if method_of(self._base.settings) == "gptq" else {}
        self.model_config = read_json(self._base.folder / "config.json")
        for section in (self.model_config, self.model_config.get("text_config")):
            if isinstance(section, dict):
                section.pop("quantization_config", None)

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
        weights = {path.name for path in self._base.files}
        for path in self._base.folder.iterdir():
            outdated = path.name in (*weights, *_NOT_COPIED) or path.name.endswith(INDEX)
            if path.is_file() and not outdated and not path.name.startswith("quantize_report"):
                shutil.copyfile(path, folder / path.name)
