"""How blocks are read from a model's files one at a time: by the loader of transformers 5, on a model of one block.

Its conversions cut, join and rename stored tensors, so a block is what loading the whole model would have made of it,
whether its files hold the experts of a layer one by one or fused.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.utils import logging as transformers_logging

from gptq_backend import CheckpointError, GPTQError
from gptq_backend.format import read_manifest
from gptq_backend.model import BlockNames, find_blocks, replace_module

from .errors import load_errors
from .experts.expert_list import ExpertList
from .experts.parallel import ParallelLinears
from .experts.unfuse import unfuse_experts
from .some_experts import Part, leave_out, tensors_but


class Bring(Protocol):
    """Gives a block its weights, but for those of the layers ``elsewhere``, which may stay on meta."""

    def __call__(self, block: nn.Module, elsewhere: Collection[nn.Module] = ()) -> None: ...


def can_read_blocks() -> bool:
    """Whether this version of transformers has such a loader; version 4 has not."""
    return hasattr(PreTrainedModel, "_finalize_model_loading")


def load_around_blocks(
    kind: type[PreTrainedModel], path: str | Path, block_name: BlockNames
) -> tuple[PreTrainedModel, Bring]:
    """A model whose blocks are on meta -> it, and what reads a block's tensors into it.

    Args:
        kind: class of the model; its blocks share no tensor with each other, nor with what is beside them.

    Raises:
        GPTQError: it cannot be loaded, or its files lack weights.
    """
    readers: list[BlockReader] = []

    def load(model: Any, state_dict: Any, files: Any, load_config: Any, *rest: Any, **more: Any) -> Any:
        stored = _check_names(kind, model, files, load_config)
        readers.append(BlockReader(model, partial(_load, kind, files, load_config), stored, block_name))
        info, index = kind._load_pretrained_model(model, state_dict, files, load_config, *rest, **more)
        info.unexpected_keys.clear()  # those of blocks
        return info, index

    # transformers asks the class to fill the model with weights; its name and module tell it how.
    members = {"_load_pretrained_model": staticmethod(load), "__module__": kind.__module__}
    loader: Any = type(kind.__name__, (kind,), members)
    with load_errors(path):
        model = loader.from_pretrained(path, dtype="auto")
    model.__class__ = kind
    (reader,) = readers
    reader.put_back(model)
    return model, partial(reader.read, model)


def check_complete(missing: Any, path: str | Path, model: nn.Module) -> None:
    """Raises GPTQError where there are ``missing`` weights."""
    if missing := sorted(missing):
        raise GPTQError(
            f"{path} cannot be loaded: its files lack {len(missing)} weights that {type(model).__name__} needs "
            f"({', '.join(missing[:3])}), and transformers would make them up; fetch all files, correct "
            "architectures in config.json, or load the model yourself and pass it instead of its folder"
        )


@contextmanager
def _without_bars() -> Iterator[None]:
    """Of transformers, which would show one for each block."""
    shown = transformers_logging.is_progress_bar_enabled()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            transformers_logging.enable_progress_bar()


@_without_bars()
def _load(kind: Any, files: Any, load_config: Any, model: Any, unread: Collection[str] = ()) -> None:
    """Fill the model with those tensors of the files that it has, and that are not to be left ``unread``."""
    with tensors_but(unread, files) as tensors:
        info, _ = kind._load_pretrained_model(model, tensors, files, load_config)
    info.unexpected_keys.clear()
    kind._finalize_model_loading(model, load_config, info)


@_without_bars()
def _check_names(kind: Any, model: Any, files: Any, load_config: Any) -> frozenset[str]:
    """Load the whole model on meta: refuse files that lack weights, or have others, before hours of work -> the names
    in the files.
    """
    path = load_config.pretrained_model_name_or_path
    try:
        stored = read_manifest([Path(file) for file in files])
    except CheckpointError as error:
        raise GPTQError(f"{path} cannot be loaded: {error}") from error
    tensors = {key: torch.empty(each.shape, device="meta") for key, each in stored.items()}
    load_config, whole = dataclasses.replace(load_config, device_map={"": "meta"}), copy.deepcopy(model)
    info, _ = kind._load_pretrained_model(whole, tensors, None, load_config)
    if info.conversion_errors:
        raise GPTQError(
            f"{path} cannot be loaded: its files lack tensors, or have others, of which {type(model).__name__} makes "
            f"{', '.join(sorted(info.conversion_errors)[:3])}; fetch all files"
        )
    kind._finalize_model_loading(whole, load_config, info)
    check_complete(info.missing_keys, path, model)
    return frozenset(stored if all(str(file).endswith(".safetensors") for file in files) else ())


class BlockReader:
    """Takes the blocks out of a model on meta, and reads them into a copy of it that has one block at a time.

    Args:
        model: on meta.
        load: fills a model like it with those of its tensors that are in the files, but for those of some names.
        stored: names of the tensors in the files.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        load: Callable[[Any, Collection[str]], None],
        stored: Collection[str],
        block_name: BlockNames,
    ) -> None:
        self.load, self.stored, self.blocks = load, stored, find_blocks(model, block_name)
        for name in self.blocks:
            replace_module(model, name, nn.Module())
        self.frame: Any = copy.deepcopy(model)
        self.frame.all_tied_weights_keys = {}
        for module in self.frame.modules():
            module._parameters.clear()
            module._buffers.clear()
            module._non_persistent_buffers_set.clear()
            module._is_hf_initialized = True

    def put_back(self, model: PreTrainedModel) -> None:
        """Give the model its blocks again, still on meta."""
        for name, block in self.blocks.items():
            replace_module(model, name, copy.deepcopy(block))
        model.eval()

    def read(self, model: Any, block: nn.Module, elsewhere: Collection[nn.Module] = ()) -> None:
        """Give a block of the ``model`` its tensors; those of experts one by one, if it has them so.

        Args:
            elsewhere: layers of the block whose weights stay on meta.

        Raises:
            GPTQError: they cannot be read.
        """
        name = next(each for each in self.blocks if model.get_submodule(each) is block)
        replace_module(self.frame, name, copy.deepcopy(self.blocks[name]))
        frame = self.frame.get_submodule(name)
        try:
            part = leave_out(model, name, frame, elsewhere, self.stored) if elsewhere else Part()
            with load_errors(model.name_or_path):
                self.load(self.frame, part.unread)
            if any(isinstance(module, ExpertList | ParallelLinears) for module in block.modules()):
                unfuse_experts(self.frame)
            for key, module in frame.named_modules():
                own = block.get_submodule(part.names.get(key, key))
                kept = own._parameters["weight"] if own in elsewhere else None
                own._parameters, own._buffers = module._parameters, module._buffers
                if kept is not None:
                    own._parameters["weight"] = kept
        finally:
            replace_module(self.frame, name, nn.Module())
