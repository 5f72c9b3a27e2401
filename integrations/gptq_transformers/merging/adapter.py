"""An adapter's files: which layers they change, and the weights of those layers with the change in them.

peft itself computes the change, layer by layer, on an ordinary ``nn.Linear`` in the place of the quantized layer: every
tuner that can be merged there can be merged here, to the bit.
"""

from __future__ import annotations

import copy
import importlib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from gptq_backend import CheckpointError, ConfigError, GPTQError
from gptq_backend.format import Manifest, read_json, read_manifest, read_tensor

from ..errors import first_line

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
_NAME = "default"
# What chooses layers by position or pattern in a whole model; here each layer is alone, and chosen by its name.
_CHOICES = ("layers_to_transform", "layers_pattern", "exclude_modules", "modules_to_save", "target_parameters")


class Adapter:
    """The adapter in a folder, for a checkpoint with certain tensors.

    Attributes:
        layers: names of the layers that its tuner changes.
        replaced: tensors of the checkpoint that it brings as a whole (``modules_to_save``, biases), by name.
        folder: where it lies.
    """

    def __init__(self, folder: Path, manifest: Manifest, shapes: Mapping[str, tuple[int, int]]) -> None:
        """
        Args:
            folder: as ``PeftModel.save_pretrained`` writes it.
            manifest: of the base checkpoint.
            shapes: (in_features, out_features) of its layers that can be changed, by name.

        Raises:
            ConfigError: peft is missing, or cannot merge this kind of adapter. CheckpointError: no adapter lies there,
                or one of another base model.
        """
        self.folder, self._peft = folder, _import_peft()
        self._stored = _read_files(folder)
        self._config = self._read_config()
        self._tuned: dict[str, dict[str, Any]] = {}
        self.replaced: dict[str, Any] = {}
        foreign = []
        for key, info in self._stored.items():
            name = key.removeprefix(_PREFIX).replace(".base_layer.", ".")
            layer = _longest_prefix(name, shapes)
            if name in manifest:
                self.replaced[name] = info
            elif layer is not None:
                self._tuned.setdefault(layer, {})[key.removeprefix(_PREFIX)] = info
            else:
                foreign.append(key)
        if foreign:
            raise CheckpointError(
                f"the adapter in {folder} has {len(foreign)} tensors for what the base model does not have (the first: "
                f"{foreign[0]}); merge it into the model that it was trained on"
            )
        self.layers = tuple(self._tuned)
        self._check_shapes(manifest, shapes)

    def merged(self, name: str, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """A layer's weight with what the adapter adds to it.

        Args:
            name: one of ``layers``.
            weight: float32 [N, K] of the base model; it is changed in place.
            bias: [N] or None.

        Raises:
            GPTQError: peft cannot merge it; the message has its reason.
        """
        linear = self._layer(name, weight, bias)
        root = nn.Module()
        parent: nn.Module = root
        *path, last = name.split(".")
        for part in path:
            child = nn.Module()
            parent.add_module(part, child)
            parent = child
        parent.add_module(last, linear)
        config = copy.deepcopy(self._config)
        config.inference_mode, config.target_modules = True, [name]
        for choice in _CHOICES:
            if getattr(config, choice, None) is not None:
                setattr(config, choice, None)
        state = {key: read_tensor(info) for key, info in self._tuned[name].items()}
        try:
            with torch.no_grad():
                self._peft.inject_adapter_in_model(config, root, _NAME)
                loaded = self._peft.set_peft_model_state_dict(root, state, _NAME)
                tuned: Any = root.get_submodule(name)
                if loaded.unexpected_keys:
                    raise ValueError(f"it stores {loaded.unexpected_keys[0]}, which this version does not know")
                tuned.merge(safe_merge=True, adapter_names=[_NAME])
        except (ValueError, RuntimeError, KeyError, AttributeError, NotImplementedError, TypeError) as error:
            raise GPTQError(
                f"peft cannot merge the adapter in {self.folder} into {name}: {first_line(error)}"
            ) from error
        base = tuned.get_base_layer()
        return base.weight.detach(), None if bias is None else base.bias.detach()

    def _layer(self, name: str, weight: Tensor, bias: Tensor | None) -> nn.Module:
        if any("lora_embedding_" in key for key in self._tuned[name]):
            return nn.Embedding(weight.shape[0], weight.shape[1], _weight=weight)
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias is not None, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            linear.bias = nn.Parameter(bias.float(), requires_grad=False)
        return linear

    def _read_config(self) -> Any:
        try:
            config = self._peft.PeftConfig.from_pretrained(str(self.folder))
        except (ValueError, KeyError, TypeError) as error:
            raise CheckpointError(
                f"{self.folder / _CONFIG} cannot be read by peft {self._peft.__version__}: {first_line(error)}"
            ) from error
        if config.is_prompt_learning:
            raise ConfigError(
                f"the adapter in {self.folder} is {config.peft_type.value}, which adds to the prompt and not to "
                "weights; it cannot be merged: load it on top of the model with peft"
            )
        return config

    def _check_shapes(self, manifest: Manifest, shapes: Mapping[str, tuple[int, int]]) -> None:
        """Before any work; the shapes of tuners other than LoRA are left to peft."""
        for name, info in self.replaced.items():
            if info.shape != manifest[name].shape:
                self._refuse(name, info.shape, manifest[name].shape)
        for layer, tensors in self._tuned.items():
            for key, info in tensors.items():
                inputs, outputs = shapes[layer]
                if key.endswith("lora_A.weight") and info.shape[1] != inputs:
                    self._refuse(key, info.shape, (info.shape[0], inputs))
                if key.endswith("lora_B.weight") and info.shape[0] != outputs:
                    self._refuse(key, info.shape, (outputs, info.shape[1]))

    def _refuse(self, name: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
        raise CheckpointError(
            f"the adapter in {self.folder} has {name} of shape {list(found)}, expected {list(expected)} for this "
            "model; merge it into the model that it was trained on"
        )


def _import_peft() -> Any:
    try:
        return importlib.import_module("peft")
    except ImportError as error:
        raise ConfigError(f"merging an adapter needs peft ({error}); install it: pip install peft") from None


def _read_files(folder: Path) -> Manifest:
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is no folder; expected that of an adapter as peft's save_pretrained writes it")
    if not (folder / _CONFIG).is_file() or not (folder / _WEIGHTS).is_file():
        lacks = _WEIGHTS if (folder / _CONFIG).is_file() else _CONFIG
        raise CheckpointError(
            f"{folder} holds no {lacks}; expected the folder of an adapter as peft's save_pretrained writes it"
        )
    read_json(folder / _CONFIG)  # says where it is no JSON, which peft would not
    return read_manifest([folder / _WEIGHTS])


def _longest_prefix(key: str, layers: Collection[str]) -> str | None:
    """The layer that a tensor of a tuner belongs to."""
    parts = key.split(".")
    prefixes = (".".join(parts[:length]) for length in range(len(parts) - 1, 0, -1))
    return next((prefix for prefix in prefixes if prefix in layers), None)
