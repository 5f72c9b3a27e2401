"""What a checkpoint holds, by the names that vLLM's model has for it."""

from __future__ import annotations

import copy
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from gptq_backend import CheckpointError, QuantizeConfig
from gptq_backend.format import (
    EMBEDDINGS,
    INDEX,
    STANDARD_FILES,
    ExpertLayout,
    ForeignLayer,
    Manifest,
    as_gptq,
    checkpoint_files,
    expert_layout,
    expert_renaming,
    indexed_files,
    layer_names,
    quantized_modules,
    read_manifest,
    renamed,
    resolve_specs,
)

from .compat import map_name

PARTS = ("qweight", "qzeros", "scales", "g_idx")
_ORDER_OF_EXPERTS = "weight_g_idx"  # what vLLM's own methods call it in experts
_DRAFT = "draft_model."  # what vLLM puts before all names of a draft that is a model by itself


class Checkpoint:
    """The tensors of a checkpoint, from its headers, by the names of one of vLLM's models.

    Raises:
        CheckpointError: a file is missing, damaged or of another format; nothing is quantized.
    """

    def __init__(self, folder: str | Path, settings: Mapping[str, Any]) -> None:
        self.folder = Path(folder)
        files = checkpoint_files(folder, settings)
        index = self.folder / f"{STANDARD_FILES[0]}{INDEX}"
        if index.is_file() and indexed_files(index) != files:
            raise CheckpointError(
                f"{folder} has both {STANDARD_FILES[0]}, which transformers reads, and the shards of {index.name}, "
                "which vLLM reads; remove one of them"
            )
        stored = read_manifest(files)
        # Also by GPTQ's names, where another tool stored a layer; the loader brings the tensors by its own.
        self.manifest: Manifest = stored | as_gptq(stored, QuantizeConfig.from_dict(settings))
        if not quantized_modules(self.manifest):
            raise CheckpointError(
                f"{folder}: its config says that the model is quantized with GPTQ, but no tensor is called *.qweight; "
                "remove quantization_config from config.json, or fetch the quantized weights"
            )
        resolve_specs(self.manifest, QuantizeConfig(), {})  # what can be refused without knowing the model
        self._use_names_of_the_file()

    def _use_names_of_the_file(self) -> None:
        self._stored = {name: name for name in self.manifest}  # vLLM's tensor name -> the file's
        self._mappers: list[Any] = []
        self._experts: dict[str, ExpertLayout] = {}
        self._named_experts: dict[str, Mapping[str, str]] = {}
        self.renamings: dict[str, str] = {}  # the file's tensor name -> the one that vLLM's model is to load it by

    def for_another_model(self) -> Checkpoint:
        """The same tensors for a model with names of its own, such as a draft that is stored beside its target."""
        other = copy.copy(self)
        other._use_names_of_the_file()
        return other

    def of_another_folder(self, folder: str | Path, settings: Mapping[str, Any]) -> Checkpoint:
        """The checkpoint in another folder, by the names of the same model."""
        other = Checkpoint(folder, settings)
        for mapper in self._mappers:
            other.rename(mapper)
        for module, layout in self._experts.items():
            other.place_experts(module, layout)
        for module, names in self._named_experts.items():
            other.name_experts(module, names)
        return other

    def rename(self, mapper: Any) -> None:
        """Apply a model's ``WeightsMapper``, which turns the names in the file into vLLM's."""
        renamed = {map_name(mapper, name): stored for name, stored in self._stored.items()}
        renamed.pop(None, None)
        self._stored = renamed
        self._mappers.append(mapper)

    def place_experts(self, module: str, layout: ExpertLayout) -> None:
        """Find the experts of vLLM's layer ``module``, which it calls as ``layout`` says, by whatever name they have.

        What has another name in the file than vLLM looks for is in ``renamings`` afterwards. That includes every
        ``g_idx``, since some models' loaders know the names that vLLM's own methods give to tensors of experts, and no
        others.

        Raises:
            CheckpointError: names that are not known, or matrices that vLLM does not have.
        """
        module = own_name(module)
        self._experts[module] = layout
        block, _ = _split_at_block(module)
        inside = [name for name in self._stored if name.startswith(block)]
        renaming = expert_renaming(layer_names(inside), {module: layout})
        for name in inside:
            stored = found = self._stored[name]
            if (wanted := renamed(name, renaming)) != name:
                self._stored[wanted] = self._stored.pop(name)
                found = self._before_mappers(stored, wanted)
            if wanted.startswith(f"{module}.") and found.endswith(".g_idx"):
                found = found.removesuffix("g_idx") + _ORDER_OF_EXPERTS
            if found != stored:
                self.renamings[stored] = found

    def expert_layout(self, module: str) -> ExpertLayout | None:
        """Where the file has the layers of the experts of ``module``; None if it has no such layers.

        Raises:
            CheckpointError: names that are not known.
        """
        module = own_name(module)
        return expert_layout(module, layer_names(self._in_block(module)), gated=True)

    def name_experts(self, module: str, names: Mapping[str, str]) -> None:
        """Let vLLM's loader call each tensor of the experts of ``module`` by a name of its own.

        Args:
            names: by the path of a layer below ``module``, what its tensors' names begin with there, both with {} for
                the expert's number; the part (``qweight``) follows.
        """
        module = own_name(module)
        self._named_experts[module] = names
        renaming = {f"{module}.{path}.": f"{module}.{start}" for path, start in names.items()}
        for name, stored in self._in_block(module).items():
            if (wanted := renamed(name, renaming)) != name:
                self._stored[name] = stored
                self.renamings[stored] = self._before_mappers(stored, wanted)

    def _in_block(self, module: str) -> dict[str, str]:
        """The file's names of the tensors in the block of ``module``, by what they are called there if the model's
        mappers, which may take a layer of an expert for a tensor of all, change no more than the block's name.
        """
        block, _ = _split_at_block(module)
        stored = (stored for name, stored in self._stored.items() if name.startswith(block))
        return {block + _split_at_block(name)[1]: name for name in stored}

    def _before_mappers(self, stored: str, wanted: str) -> str:
        """The name that the model's own mappers turn into ``wanted``: of the file up to the block, then vLLM's."""
        start, rest = (_split_at_block(name) for name in (stored, wanted))
        found = start[0] + rest[1]
        mapped = found
        for mapper in self._mappers:
            mapped = map_name(mapper, mapped)
        if mapped != wanted:
            raise CheckpointError(
                f"{stored}: vLLM's model looks for this tensor as {wanted}, and its own names cannot be put in the "
                "place of the checkpoint's; export the checkpoint with the names of the original model"
            )
        return found

    def stored_name(self, module: str) -> str | None:
        """The file's name of vLLM's layer ``module``; None if the file does not have it under a name known here."""
        for part in ("qweight", "weight"):
            if (name := self._stored.get(f"{own_name(module)}.{part}")) is not None:
                return name.removesuffix(f".{part}")
        return None

    def parts(self, module: str) -> dict[str, torch.dtype | None]:
        """Dtypes in the file of the parts of layer ``module``; empty when it is not known."""
        name, manifest = self.stored_name(module), self.manifest
        if (foreign := self.foreign(module)) is not None:
            return {part: info.dtype for part, info in foreign.parts.items()}
        parts = PARTS if f"{name}.qweight" in manifest else ("weight",)
        return {part: manifest[key].dtype for part in parts if (key := f"{name}.{part}") in manifest}

    def foreign(self, module: str) -> ForeignLayer | None:
        """What another tool stored of layer ``module``; None if GPTQ stored it, or if it is dense or not known."""
        qweight = self.manifest.get(f"{self.stored_name(module)}.qweight")
        return qweight.file if qweight is not None and isinstance(qweight.file, ForeignLayer) else None

    def is_quantized(self, module: str) -> bool | None:
        """Whether layer ``module`` is quantized; None when the file does not have it under a name known here."""
        name = self.stored_name(module)
        return None if name is None else f"{name}.qweight" in self.manifest

    def embedding(self) -> str | None:
        """The only quantized layer that has the name of an embedding of tokens; None if there is none, or several."""
        found = [name.removesuffix(".qweight") for name in self._stored if name.endswith(".qweight")]
        found = [name for name in found if name.rpartition(".")[2] in EMBEDDINGS]
        return found[0] if len(found) == 1 else None

    def quantized_inside(self, module: str) -> bool:
        """Whether any layer inside ``module`` is quantized."""
        inside = f"{own_name(module)}."
        return any(name.startswith(inside) and name.endswith(".qweight") for name in self._stored)


def own_name(module: str) -> str:
    """What vLLM's layer ``module`` is called in its model, which does not depend on whether that is a draft."""
    return module.removeprefix(_DRAFT)


def _split_at_block(name: str) -> tuple[str, str]:
    """``model.layers.0.`` and what comes after it."""
    match = re.match(r".*?\.\d+\.", name)
    return ("", name) if match is None else (match[0], name[match.end() :])
