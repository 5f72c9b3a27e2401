"""How a large model is quantized in little memory: blocks are read when their turn comes, and written after it."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from gptq_backend import ConfigError, GPTQError, QuantizeConfig
from gptq_backend.format import Shards
from gptq_backend.model import BlockNames, find_blocks, find_structure
from gptq_backend.module_moves import offloading_hook
from gptq_backend.timing import timed

from .errors import load_errors
from .experts.unfuse import unfuse_experts
from .model_class import class_of, from_config, from_pretrained, read_config

_SHARD_BYTES = 10**9  # what may wait in memory for its file to be written


def skeleton(path: str | Path, trust_remote_code: bool = False) -> PreTrainedModel:
    """The model that config.json names, without its weights, on the meta device.

    Raises:
        ConfigError: it is quantized, or of a class that is not available. GPTQError: it cannot be loaded.
    """
    config = read_config(path, trust_remote_code)
    if getattr(config, "quantization_config", None) is not None:
        raise ConfigError(f"{path} is quantized already; pass the original 16-bit model")
    loader = class_of(config, path, trust_remote_code)
    with load_errors(path, (Exception,)), torch.device("meta"):  # no code of ours runs here
        return from_config(loader, config, trust_remote_code)


def load_whole(
    path: str | Path, dtype: torch.dtype | str = "auto", trust_remote_code: bool = False, **kwargs: Any
) -> PreTrainedModel:
    """The model that config.json names, in memory.

    Args:
        dtype: of the weights; ``auto`` is as stored.

    Raises:
        GPTQError: it cannot be loaded, or its files lack weights that it needs.
    """
    loader = class_of(read_config(path, trust_remote_code), path, trust_remote_code)
    with load_errors(path):
        model, info = from_pretrained(
            loader, path, dtype=dtype, trust_remote_code=trust_remote_code, output_loading_info=True, **kwargs
        )
    if missing := sorted(info["missing_keys"]):
        raise GPTQError(
            f"{path} cannot be loaded: its files lack {len(missing)} weights that {type(model).__name__} needs "
            f"({', '.join(missing[:3])}), and transformers would make them up; fetch all files, correct "
            "architectures in config.json, or load the model yourself and pass it instead of its folder"
        )
    return model


def load_streamed(
    path: str | Path,
    scratch: str,
    config: QuantizeConfig | None = None,
    block_name: BlockNames = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model with its blocks on accelerate's disk offload: they stay in the checkpoint's files until needed.

    Fused experts have to be split in memory, so such a model is loaded as a whole.

    Raises:
        ConfigError: ``config`` does not fit the model; no weight was read. GPTQError: it cannot be loaded.
    """
    model, device_map = skeleton(path, trust_remote_code), None
    if not unfuse_experts(model):
        if config is not None:
            find_structure(model, config, block_name)
        device_map = _device_map(model, "", set(find_blocks(model, block_name)))
    return load_whole(path, "auto", trust_remote_code, device_map=device_map, offload_folder=scratch)


def _device_map(module: nn.Module, name: str, blocks: set[str]) -> dict[str, str]:
    """Blocks on disk, all that is beside them in memory, with as few entries as that takes."""
    if name in blocks:
        return {name: "disk"}
    if not any(block.startswith(f"{name}.") for block in blocks) and name:
        return {name: "cpu"}
    prefix = f"{name}." if name else ""
    own = [*dict(module.named_parameters(recurse=False)), *dict(module.named_buffers(recurse=False))]
    device_map = {prefix + key: "cpu" for key in own}
    for child_name, child in module.named_children():
        device_map.update(_device_map(child, prefix + child_name, blocks))
    return device_map


def detach_offloading(model: PreTrainedModel, block_name: BlockNames = None) -> Callable[[nn.Module], None]:
    """Remove accelerate's offloading from ``model`` -> a function that loads a block's offloaded weights to stay.

    What is offloaded outside the blocks is loaded at once. The hooks of a model that is only spread over devices stay:
    they carry what its blocks hand on. Both raise GPTQError where weights are missing or have another shape.
    """
    hooks = {module: hook for module in model.modules() if (hook := offloading_hook(module)) is not None}
    if hooks:
        with load_errors(model.name_or_path):
            remove_hook_from_submodules(model)
        if hasattr(model, "hf_device_map"):
            del model.hf_device_map

    def bring(modules: Iterable[nn.Module]) -> None:
        with load_errors(model.name_or_path):
            for module in modules:
                if module in hooks:
                    hooks.pop(module).pre_forward(module)

    if hooks:
        inside = {module for block in find_blocks(model, block_name).values() for module in block.modules()}
        bring([module for module in hooks if module not in inside])
    return lambda block: bring(block.modules())


class BlockWriter:
    """Writes finished blocks into the shards of a checkpoint, a file whenever enough of them wait.

    A written block stays usable: its tensors become maps of the file, which take memory only while they are read.
    """

    def __init__(self, model: PreTrainedModel, folder: Path) -> None:
        self.model, self.folder, self.shards = model, folder, Shards(folder, _SHARD_BYTES)

    @classmethod
    def of(cls, model: PreTrainedModel, folder: Path, block_name: BlockNames = None) -> BlockWriter | None:
        """None where only ``save_pretrained`` knows what to write: other names in the file, tensors that blocks share.

        None on Windows too, which does not rename files that are mapped.
        """
        renamed = getattr(model, "_weight_conversions", None) or getattr(model, "_checkpoint_conversion_mapping", None)
        if renamed or os.name == "nt":
            return None
        states = [block.state_dict(keep_vars=True) for block in find_blocks(model, block_name).values()]
        held = list(itertools.chain.from_iterable(state.values() for state in states))
        return cls(model, folder) if len(set(map(id, held))) == len(held) else None

    @timed("write")
    def add(self, name: str, block: nn.Module) -> None:
        """Take the finished block that the model calls ``name``."""
        written = self.shards.add({f"{name}.{key}": tensor for key, tensor in block.state_dict().items()})
        if written is not None:
            self.model.load_state_dict(load_file(written), strict=False, assign=True)

    @timed("write")
    def save(self) -> None:
        """Write what is left and the other files of the model."""
        model = self.model
        if not self.shards.files:
            model.save_pretrained(self.folder)
            return
        written = set(itertools.chain.from_iterable(self.shards.files.values()))
        rest = {key: tensor for key, tensor in model.state_dict().items() if key not in written}
        quantizer, model.hf_quantizer = model.hf_quantizer, None  # with it, only a whole state dict is written
        try:
            model.save_pretrained(self.folder, state_dict=rest, max_shard_size=1 << 50)
        finally:
            model.hf_quantizer = quantizer
        last = self.folder / "model.safetensors"
        self.shards.adopt(last, load_file(last))
        self.shards.finish()
