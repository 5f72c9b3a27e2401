"""How a large model is quantized in little memory: blocks are read when their turn comes, and written after it."""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Collection, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate.hooks import remove_hook_from_submodules
from safetensors.torch import load_file
from torch import nn
from transformers import PreTrainedModel

from gptq_backend import ConfigError, QuantizeConfig
from gptq_backend.format import Shards
from gptq_backend.model import BlockNames, Progress, Structure, find_blocks, find_structure
from gptq_backend.module_moves import offloading_hook
from gptq_backend.timing import timed

from .block_reader import Bring, can_read_blocks, check_complete, load_around_blocks
from .errors import load_errors
from .experts.conversions import are_only_renamed, keep_packed_names, stored_names
from .experts.unfuse import unfuse_experts
from .model_class import class_of, from_config, from_pretrained, read_config

_ONE_FILE_BYTES = 10**9  # a checkpoint that is not larger is one file


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
    check_complete(info["missing_keys"], path, model)
    return model


def load_streamed(
    path: str | Path,
    scratch: str,
    config: QuantizeConfig | None = None,
    block_name: BlockNames = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, Bring]:
    """The model, whose blocks stay in the checkpoint's files until needed -> it, and what brings a block's weights.

    With transformers 4 they are on accelerate's disk offload. Blocks that share weights are loaded at once, and with
    transformers 4 those that have fused experts.

    Raises:
        ConfigError: ``config`` does not fit the model; no weight was read. GPTQError: it cannot be loaded.
    """
    model = skeleton(path, trust_remote_code)
    blocks = find_blocks(model, block_name)
    kind, apart = type(model), _are_apart(model, blocks.values())
    fused = unfuse_experts(model)
    if config is not None:
        find_structure(model, config, block_name)
    # accelerate would bring the weights of modules that are split into others.
    if not apart or (fused and not can_read_blocks()):
        return load_whole(path, "auto", trust_remote_code), lambda block, elsewhere=(): None
    if can_read_blocks():
        return load_around_blocks(kind, path, block_name)
    device_map = _device_map(model, "", set(blocks))
    model = load_whole(path, "auto", trust_remote_code, device_map=device_map, offload_folder=scratch)
    return model, detach_offloading(model, block_name)


def _are_apart(model: nn.Module, blocks: Collection[nn.Module]) -> bool:
    """Whether no tensor of a block is also in another one, or beside them."""
    inside = [set(block.modules()) for block in blocks]
    beside = set(model.modules()).difference(*inside)
    places = [{id(tensor) for module in each for tensor in module._parameters.values()} for each in (*inside, beside)]
    none = {id(None)}
    return sum(len(place - none) for place in places) == len(set().union(*places) - none)


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


def detach_offloading(model: PreTrainedModel, block_name: BlockNames = None) -> Bring:
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

    def bring_block(block: nn.Module, elsewhere: Collection[nn.Module] = ()) -> None:
        bring(each for each in block.modules() if each not in elsewhere or each.bias is not None)

    return bring_block


class BlockWriter:
    """Makes a checkpoint of the files in which ``progress`` keeps the finished blocks.

    A finished block stays usable: its tensors become maps of its file, which take memory only while they are read.
    """

    def __init__(self, model: PreTrainedModel, progress: Progress) -> None:
        self.model, self.progress = model, progress
        progress.stored_names = partial(stored_names, model)

    @classmethod
    def of(cls, model: PreTrainedModel, progress: Progress, structure: Structure) -> BlockWriter | None:
        """None where only ``save_pretrained`` knows what to write: tensors that become others, or that blocks share.

        None on Windows too, which does not remove files that are mapped.
        """
        packed = [f"{target.name}.{key}" for target in structure.targets for key in ("weight", "bias")]
        keep_packed_names(model, packed)
        if os.name == "nt" or not are_only_renamed(model):
            return None
        states = [block.module.state_dict(keep_vars=True) for block in structure.blocks]
        held = list(itertools.chain.from_iterable(state.values() for state in states))
        return cls(model, progress) if len(set(map(id, held))) == len(held) else None

    @timed("write")
    def add(self, name: str, block: nn.Module) -> None:
        """Let the finished block that the model calls ``name`` leave the memory."""
        if (path := self.progress.files.get(name)) is None:
            return
        names = stored_names(self.model, [f"{name}.{key}" for key in block.state_dict()])
        stored = load_file(path)
        tensors = {key.removeprefix(f"{name}."): stored[own] for key, own in names.items()}
        block.load_state_dict(tensors, strict=False, assign=True)

    @timed("write")
    def save(self, folder: Path) -> None:
        """Write what is left and the other files of the model into ``folder``; a small model becomes one file."""
        model = self.model
        files = {path: load_file(path) for path in self.progress.files.values()}  # maps of them
        written = set(itertools.chain.from_iterable(files.values()))
        state = model.state_dict()
        rest = {key: state[key] for key, stored in stored_names(model, state).items() if stored not in written}
        quantizer, model.hf_quantizer = model.hf_quantizer, None  # with it, only a whole state dict is written
        try:
            model.save_pretrained(folder, state_dict=rest, max_shard_size=1 << 50)
        finally:
            model.hf_quantizer = quantizer
        last = folder / "model.safetensors"
        files[last] = load_file(last)
        shards = Shards(folder)
        if sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values()) <= _ONE_FILE_BYTES:
            shards.add({name: tensor for tensors in files.values() for name, tensor in tensors.items()})
            shards.flush()
        else:
            for number, (path, tensors) in enumerate(files.items(), start=1):
                shards.adopt(path if path == last else _linked(path, folder / f"part-{number}"), tensors)
        shards.finish()


def _linked(path: Path, other: Path) -> Path:
    """The same file under another name, too: whatever happens to the one, the other stays."""
    try:
        os.link(path, other)
    except OSError:  # of file systems that cannot
        shutil.copyfile(path, other)
    return other
