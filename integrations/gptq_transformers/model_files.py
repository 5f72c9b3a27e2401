"""A model's files beside its weights: where one lies, and copies of those that ``save_pretrained`` does not write."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from transformers.utils import cached_file

logger = logging.getLogger(__name__)

_MODULES = "modules.json"  # of sentence-transformers: how the states of tokens become the embedding of a text
# Of processors, and of sentence-transformers; one more for each kind of model that the latter once had.
_NAMES = (
    "preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json",
    "audio_tokenizer_config.json", "chat_template.json", "config_sentence_transformers.json",
)  # fmt: skip
_KINDS = ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
_OF_A_MODULE = ("config.json", "model.safetensors", "pytorch_model.bin")


def local_file(model: str | Path, name: str) -> Path | None:
    """The file called ``name`` in a model's folder, or in the hub's cache; None if it is not there. Asks no hub."""
    if Path(model).is_dir():
        found = Path(model) / name
        return found if found.is_file() else None
    try:
        cached = cached_file(str(model), name, local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if cached is None else Path(cached)


def copy_companions(original: str | Path, folder: Path) -> None:
    """Copy what processors and sentence-transformers read into the checkpoint in ``folder``, unless it is there."""
    for name in (*_NAMES, *(f"sentence_{kind}_config.json" for kind in _KINDS), _MODULES):
        _copy(original, folder, name)
    if (folder / _MODULES).is_file():
        for module in _module_folders(folder / _MODULES):
            for name in _OF_A_MODULE:
                _copy(original, folder, f"{module}/{name}")


def _copy(original: str | Path, folder: Path, name: str) -> None:
    target = folder / name
    found = cached_file(
        str(original),
        name,
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if found is not None and Path(found).is_file() and not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(found, target)


def _module_folders(file: Path) -> Iterator[str]:
    """The folders, inside the model's, of what follows the transformer."""
    try:
        modules = json.loads(file.read_text(encoding="utf-8"))
        paths = [PurePosixPath(module["path"]) for module in modules]
    except (ValueError, RecursionError, TypeError, KeyError):
        logger.warning("%s is damaged: the folders that it names were not copied", file.name)
        return
    for path in paths:
        if path.parts and not path.is_absolute() and ".." not in path.parts:
            yield str(path)
