"""``from_quantized``: ``from_pretrained`` for quantized checkpoints that transformers does not recognize."""

from __future__ import annotations

import json
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from gptq_backend import QuantizeConfig
from gptq_backend.foreign_settings import gptq_settings
from gptq_backend.format import (
    INDEX,
    STANDARD_FILES,
    checkpoint_files,
    embedded_settings,
    read_json,
    read_manifest,
    read_settings,
)
from gptq_backend.locks import Scratch

from .errors import load_errors
from .model_class import class_to_load, from_pretrained


def from_quantized(path: str | Path, **kwargs: Any) -> PreTrainedModel:
    """Load a quantized checkpoint, also one that plain ``from_pretrained`` cannot see as such.

    That is: settings in ``quantize_config.json`` or ``quant_config.json`` only, or without ``quant_method: gptq``, or a
    weights file with AutoGPTQ's name (``gptq_model-4bit-128g.safetensors``). Checkpoints of AWQ, AutoRound and
    compressed-tensors are loaded by gptq_backend, whether their own packages are installed or not. Everything else
    equals ``from_pretrained`` of the class that the checkpoint names in ``architectures``: of ``AutoModelForCausalLM``
    for a language model.

    Args:
        path: a folder, or a name on the hub (which must then be in transformers' own layout).
        **kwargs: for ``from_pretrained``; ``trust_remote_code=True`` lets code that comes with the model run.

    Raises:
        ConfigError: no quantization settings anywhere, or a class that is not available. CheckpointError: no usable
            weights. GPTQError: transformers cannot load the model.
    """
    source = Path(path)
    if not source.is_dir():
        return from_pretrained(class_to_load(path, kwargs), path, **kwargs)
    settings = read_settings(source)
    QuantizeConfig.from_dict(settings)  # refuses what cannot be read
    weights = checkpoint_files(source, settings)
    if _is_standard(source):
        return _load(path, path, kwargs)
    view, model = Scratch("view"), None
    try:
        _link_as_standard(source, settings, weights, Path(view.path))
        model = _load(path, view.path, kwargs)
    finally:
        if model is not None and "disk" in getattr(model, "hf_device_map", {}).values():
            weakref.finalize(model, view.remove)  # weights are read through it
        else:
            view.remove()
    model.name_or_path = model.config._name_or_path = str(path)
    return model


def _load(path: str | Path, folder: str | Path, kwargs: dict[str, Any]) -> PreTrainedModel:
    with load_errors(path, (Exception,)):  # a config.json of any content makes the code of models raise any kind
        return from_pretrained(class_to_load(folder, kwargs), folder, **kwargs)


def _is_standard(folder: Path) -> bool:
    """Whether plain ``from_pretrained`` finds both the settings and the weights."""
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    settings = embedded_settings(config)
    named = isinstance(settings, Mapping) and settings.get("quant_method") == "gptq"
    first = next((name for name in STANDARD_FILES if (folder / name).is_file()), None)
    if not named or first is None:
        return False
    return not first.endswith(INDEX) or "metadata" in read_json(folder / first)  # transformers needs it


def _link_as_standard(folder: Path, settings: Mapping[str, Any], weights: list[Path], view: Path) -> None:
    """Fill ``view`` with links to the files of a checkpoint, named and configured as transformers expects."""
    config = read_json(folder / "config.json")
    single, *_ = STANDARD_FILES if weights[0].suffix == ".safetensors" else STANDARD_FILES[2:]
    for path in folder.iterdir():
        if path.is_file() and path not in weights and path.name != "config.json" and not path.name.endswith(INDEX):
            (view / path.name).symlink_to(path.resolve())
    for path in weights:
        link = view / (single if len(weights) == 1 else path.relative_to(folder))
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(path.resolve())
    if len(weights) > 1:
        where = {key: str(info.file.path.relative_to(folder)) for key, info in read_manifest(weights).items()}
        (view / f"{single}{INDEX}").write_text(json.dumps({"metadata": {}, "weight_map": where}), encoding="utf-8")
    config["quantization_config"] = {**gptq_settings(settings), "quant_method": "gptq"}
    (view / "config.json").write_text(json.dumps(config), encoding="utf-8")
