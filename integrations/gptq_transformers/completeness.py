"""No tensor of an original model is lost on the way into its quantized checkpoint."""

from __future__ import annotations

import logging
from collections.abc import Iterable
from pathlib import Path

import torch
import transformers
from torch import nn

from gptq_backend import CheckpointError, TiedHead
from gptq_backend.format import Shards, checkpoint_files, read_manifest, read_tensor

from .experts.conversions import converters
from .experts.expert_list import ExpertList
from .experts.parallel import ParallelLinears
from .loading.checkpoint_names import model_names
from .model_files import local_file

logger = logging.getLogger(__name__)


def keep_all_tensors(original: str | Path, model: nn.Module, folder: Path) -> None:
    """Compare the tensors of the original's files with those in ``folder``, and copy those that the model does not use.

    Raises:
        CheckpointError: a tensor that the model uses was not written.
    """
    config = local_file(original, "config.json")  # in the hub's cache all files of a model are in one folder, too
    assert config is not None  # the model was loaded from there
    stored = read_manifest(checkpoint_files(config.parent))
    lost, unused = missing_tensors(model, stored, read_manifest(checkpoint_files(folder)))
    if lost:
        raise CheckpointError(
            f"{len(lost)} tensors of {original} would be lost ({', '.join(lost[:3])}), and nothing was written; load "
            "the model with the class that it was saved with, and pass it instead of its folder"
        )
    if not unused:
        return
    logger.warning(
        "%s does not use %d tensors of %s (%s): they were copied as they are",
        type(model).__name__,
        len(unused),
        original,
        ", ".join(unused[:3]),
    )
    shards = Shards(folder)
    for file in checkpoint_files(folder):
        with torch.device("meta"):
            shards.adopt(file, {key: torch.empty(i.shape, dtype=i.dtype) for key, i in read_manifest([file]).items()})
    for key in unused:
        shards.add({key: read_tensor(stored[key])})
    shards.flush()
    shards.finish()


def missing_tensors(model: nn.Module, original: Iterable[str], written: Iterable[str]) -> tuple[list[str], list[str]]:
    """Names in the ``original``'s files that are not in the ``written`` ones: those that ``model`` has, and others.

    A quantized weight counts as written, and so does a weight of several names under one of them; tables that the
    model computes for itself need not be written.
    """
    found = set(written)
    rest = [key for key in original if key not in found and _packed(key) not in found]
    if not rest:
        return [], []
    # What version 4 does by default with the names of vision-language models; version 5 finds it by itself.
    renaming = getattr(model, "_checkpoint_conversion_mapping", None) if transformers.__version__[0] == "4" else None
    names = model_names(model, [*rest, *found], renaming)
    held = {names[key] for key in found}
    parameters = dict(model.named_parameters(remove_duplicate=False))
    aliases: dict[int, list[str]] = {}
    for name, parameter in parameters.items():
        aliases.setdefault(id(parameter), []).append(name)
    computed = {
        f"{name}.{key}".removeprefix(".") for name, m in model.named_modules() for key in m._non_persistent_buffers_set
    }
    computed |= {f"{name}.weight" for name, m in model.named_modules() if isinstance(m, TiedHead)}
    used = {*parameters, *dict(model.named_buffers(remove_duplicate=False))}
    lists = {name: m for name, m in model.named_modules() if isinstance(m, ExpertList | ParallelLinears)}
    split = {f"{name}.{key}" for name, m in lists.items() for key in m.fused_names}
    made_of = converters(model)
    lost: list[str] = []
    unused: list[str] = []
    for key in rest:
        # What is cut or joined on loading has the name of the first parameter that it becomes a part of.
        places = [converter.rename_source_key(names[key]) for converter in made_of]
        name = next((place for place, source in places if source is not None), names[key])
        known = [name, *aliases.get(id(parameters.get(name)), [])]
        if name in computed or name in split or any(each in held or _packed(each) in held for each in known):
            continue
        (lost if name in used else unused).append(key)
    return lost, unused


def _packed(key: str) -> str:
    """Of a quantized layer's weight."""
    return f"{key.removesuffix('.weight')}.qweight"
