"""The checkpoint that an adapter is merged into, read from its files one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from gptq_backend import CheckpointError, ConfigError, QuantizeConfig, QuantizedWeight
from gptq_backend.format import (
    as_gptq,
    checkpoint_files,
    quantized_modules,
    read_manifest,
    read_quantized,
    read_settings,
    read_tensor,
    resolve_specs,
)

from ..model_files import local_file
from .adapter import Adapter


class Base:
    """A GPTQ checkpoint.

    Attributes:
        folder: where its files are.
        settings, config: how it says that it is quantized.
        manifest: its tensors.
        specs: of its quantized layers.
    """

    def __init__(
        self, model: str | Path, instead: str = "merge the adapter with peft (merge_and_unload(), then save_pretrained)"
    ) -> None:
        """model: folder or name; instead: what to do with one that is not quantized.

        Raises:
            ConfigError: it is not quantized. CheckpointError: it cannot be read.
        """
        config_file = local_file(model, "config.json")
        if config_file is None:
            raise CheckpointError(f"{model} holds no config.json; expected the folder of a quantized checkpoint")
        self.folder = config_file.parent
        try:
            self.settings = read_settings(self.folder)
        except ConfigError:
            raise ConfigError(f"{model} is not quantized; {instead}") from None
        self.config = QuantizeConfig.from_dict(self.settings)
        self.files = checkpoint_files(self.folder, self.settings)
        self.manifest = as_gptq(read_manifest(self.files), self.config)
        self.specs = resolve_specs(self.manifest, self.config)

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(in_features, out_features) of all that an adapter may change: quantized layers and dense matrices."""
        dense = {
            name.removesuffix(".weight"): (info.shape[1], info.shape[0])
            for name, info in self.manifest.items()
            if name.endswith(".weight") and len(info.shape) == 2
        }
        return dense | {name: (spec.in_features, spec.out_features) for name, spec in self.specs.items()}

    def parts(self, layer: str) -> dict[str, Tensor]:
        """The stored tensors of a layer."""
        prefix = f"{layer}."
        keys = [key for key in self.manifest if key.rpartition(".")[0] == layer]
        return {key.removeprefix(prefix): read_tensor(self.manifest[key]) for key in keys}

    def quantized(self, layer: str) -> QuantizedWeight:
        """A layer's codes, scales, zeros and groups."""
        return read_quantized(self.specs[layer], self.parts(layer), layer)

    def merged(self, layer: str, adapter: Adapter) -> tuple[Tensor, Tensor | None]:
        """The weight [N, K] of a layer with the adapter in it, in float32, and its bias in the stored dtype."""
        parts = self.parts(layer)
        if layer in self.specs:
            weight = read_quantized(self.specs[layer], parts, layer).dequantize(torch.float32)
        else:
            weight = parts["weight"].float()
        bias = parts.get("bias")
        if f"{layer}.bias" in adapter.replaced:
            assert bias is not None
            bias = read_tensor(adapter.replaced[f"{layer}.bias"]).to(bias.dtype)
        if layer not in adapter.layers:
            return weight, bias
        dtype = None if bias is None else bias.dtype
        weight, bias = adapter.merged(layer, weight, bias)
        return weight, None if bias is None else bias.to(dtype)

    def touched(self, adapter: Adapter) -> list[str]:
        """The quantized layers that the adapter changes, in the order of the file."""
        return [name for name in quantized_modules(self.manifest) if name in adapter.layers]

    def dense_names(self, adapter: Adapter) -> list[str]:
        """Tensors that are not quantized and that the adapter changes."""
        return [*adapter.replaced, *(f"{layer}.weight" for layer in adapter.layers if layer not in self.specs)]

    def dense_changes(self, adapter: Adapter) -> Iterator[tuple[str, Tensor]]:
        """Those, in their stored dtype."""
        for name, info in adapter.replaced.items():
            yield name, read_tensor(info).to(self.manifest[name].dtype)
        for layer in adapter.layers:
            if layer not in self.specs:
                yield f"{layer}.weight", self.merged(layer, adapter)[0].to(self.manifest[f"{layer}.weight"].dtype)
