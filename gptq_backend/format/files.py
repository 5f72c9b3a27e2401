"""Which files of a checkpoint's folder hold its settings and its weights: one rule for everyone who reads one.

The rule is that of transformers, and AutoGPTQ's where transformers finds nothing. What an untrusted folder can name is
bounded: regular files inside it, of its own kind, and JSON of a reasonable size.
"""

from __future__ import annotations

import json
import logging
import os
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..dialects import as_integer, canonical
from ..errors import CheckpointError, ConfigError
from .headers import FETCH_AGAIN, read_manifest, read_tensor, require_regular

logger = logging.getLogger(__name__)

SETTINGS_FILES = ("config.json", "quantize_config.json", "quant_config.json")
# Two scalars that text-generation-inference stored instead of a config.
TGI_TENSORS = ("gptq_bits", "gptq_groupsize")

_MAX_JSON_BYTES = 64 << 20  # an index of a million tensors has less
INDEX = ".index.json"
STANDARD_FILES = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin", f"pytorch_model.bin{INDEX}")
_SUFFIXES = (".safetensors", ".bin", ".pt")
# Beside the weights in folders of trainers; none of them holds a model.
_NOT_WEIGHTS = ("adapter_", "optimizer", "rng_state", "scheduler", "training_args", ".")


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file.

    Raises:
        CheckpointError: not a regular file, too large, not JSON, nested too deeply, or no object.
    """
    require_regular(path)
    if (size := path.stat().st_size) > _MAX_JSON_BYTES:
        raise CheckpointError(f"{path} has {size} bytes, expected at most {_MAX_JSON_BYTES}; {FETCH_AGAIN}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise CheckpointError(f"{path} is nested too deeply to be read; {FETCH_AGAIN}") from None
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); {FETCH_AGAIN}") from None
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read ({error.strerror}); check its permissions") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object; {FETCH_AGAIN}")
    return content


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The quantization settings as written: from config.json, else from quantize_config.json or quant_config.json.

    Raises:
        ConfigError: there are none. CheckpointError: a file is not JSON, or holds no object.
    """
    folder = Path(folder)
    for name in SETTINGS_FILES:
        if content := settings_in(folder / name):
            return content
    if folder.is_dir() and (scalars := _tgi_settings(folder)):
        return scalars
    raise ConfigError(
        f"{folder} has no quantization settings: expected quantization_config in config.json, or quantize_config.json; "
        "if the checkpoint is quantized, add a quantize_config.json with bits, group_size, desc_act and sym"
    )


def settings_in(path: Path) -> dict[str, Any]:
    """The quantization settings in one of :data:`SETTINGS_FILES`; {} if it does not exist or has none.

    Raises:
        CheckpointError: it is not JSON, or has something else in their place.
    """
    if not os.path.exists(path):
        return {}
    content = read_json(path)
    if path.name == "config.json":
        content = embedded_settings(content)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: quantization_config is {content!r:.60}, expected an object; {FETCH_AGAIN}")
    return content


def embedded_settings(config: Mapping[str, Any]) -> Any:
    """The quantization settings in the content of a config.json, or in its ``text_config``; {} if there are none."""
    for section in (config, config.get("text_config")):
        if isinstance(section, Mapping) and section.get("quantization_config"):
            return section["quantization_config"]
    return {}


def checkpoint_files(folder: str | Path, settings: Mapping[str, Any] | None = None) -> list[Path]:
    """The files that hold the weights.

    Those that transformers reads: ``model.safetensors``, else the shards of its index, else ``pytorch_model.bin``, else
    the shards of its index. Where there is none of them, or config.json has no quantization settings, so that only
    AutoGPTQ's way of reading finds them: the file that ``settings`` name, else AutoGPTQ's name, else the only file.

    Args:
        folder: the checkpoint.
        settings: its quantization settings, which may name the file (``model_basename``).

    Raises:
        CheckpointError: none, several that nothing tells apart, or one that is missing, outside of the folder or no
            regular file.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected one with a checkpoint's files")
    config = read_json(folder / "config.json") if os.path.exists(folder / "config.json") else {}
    named = list(_named(settings or {}))
    candidates = [*STANDARD_FILES, *named] if embedded_settings(config) else [*named, *STANDARD_FILES]
    explicit = config.get("transformers_weights")
    for name in [explicit] if isinstance(explicit, str) else candidates:
        if isinstance(explicit, str) or os.path.lexists(folder / name):
            _warn_of_both(folder)
            file = _inside(folder, name, "the checkpoint")
            return indexed_files(file) if name.endswith(INDEX) else [file]
    return _only_files(folder)


def _only_files(folder: Path) -> list[Path]:
    for suffixes in ((".safetensors",), (".bin", ".pt")):
        found = sorted(
            path for path in folder.iterdir() if path.suffix in suffixes and not path.name.startswith(_NOT_WEIGHTS)
        )
        if len(found) == 1 or (found and _complete_shards(found)):
            return [_inside(folder, path.name, "the checkpoint") for path in found]
        if found:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(
                f"{folder} holds several weight files ({names}) and no index; name one in quantize_config.json as "
                "model_basename, or remove the others"
            )
    raise CheckpointError(f"{folder} holds no *.safetensors, *.bin or *.pt file; fetch the checkpoint's weights")


def _warn_of_both(folder: Path) -> None:
    if all((folder / name).is_file() for name in STANDARD_FILES[:2]):
        logger.warning(
            "%s has both model.safetensors and an index of shards; model.safetensors is read, as transformers does, "
            "and the shards are not: remove one of them",
            folder,
        )


def _named(settings: Mapping[str, Any]) -> Iterator[str]:
    """Names of files that AutoGPTQ would look for."""
    stems = [settings.get(key) for key in ("model_basename", "model_file_base_name")]
    found = canonical(settings)
    stems.append(f"gptq_model-{as_integer(found.get('bits'))}bit-{as_integer(found.get('group_size'))}g")
    for stem in stems:
        # A name, not a path: "model_basename": "../../x" finds nothing.
        if isinstance(stem, str) and re.fullmatch(r"[^/\\\0]{1,200}", stem):
            for suffix in _SUFFIXES:
                yield f"{stem}{suffix}"
                yield f"{stem}{suffix}{INDEX}"


def indexed_files(index: Path) -> list[Path]:
    """The shards that an index names.

    Raises:
        CheckpointError: it names none, or some that are missing or that must not be read.
    """
    folder = index.parent
    content = read_json(index)
    weight_map = content.get("weight_map")
    if not isinstance(content.get("metadata", {}), dict):
        raise CheckpointError(f"{index}: metadata is {content['metadata']!r:.60}, expected an object; {FETCH_AGAIN}")
    if not isinstance(weight_map, dict) or not weight_map or not all(isinstance(v, str) for v in weight_map.values()):
        raise CheckpointError(f"{index} has no weight_map from names of tensors to names of files; {FETCH_AGAIN}")
    names = sorted(set(weight_map.values()))
    missing = [shard for shard in names if "\0" not in shard and not os.path.exists(folder / shard)]
    if missing:
        raise CheckpointError(
            f"{folder}: {len(missing)} of {len(names)} shards named in {index.name} are missing "
            f"({', '.join(missing[:3]):.200}); fetch them"
        )
    suffix = Path(index.name.removesuffix(INDEX)).suffix
    for shard in names:
        if Path(shard).suffix != suffix:
            raise CheckpointError(f"{index} names {shard!r:.200}, expected *{suffix} files; {FETCH_AGAIN}")
    return [_inside(folder, shard, index.name) for shard in names]


def _inside(folder: Path, name: str, source: str) -> Path:
    """The file ``name`` of the folder, which ``source`` asks for; a link may lead out, as in the cache of the hub."""
    if "\0" in name or Path(name).is_absolute() or ".." in Path(name).parts:
        raise CheckpointError(
            f"{folder}: {source} names the file {name!r:.200}, which is outside of the folder; expected a file inside "
            "it: fetch the checkpoint again from a source that you trust"
        )
    require_regular(folder / name)
    return folder / name


def _complete_shards(files: list[Path]) -> bool:
    numbers = [re.search(r"-(\d+)-of-(\d+)\.", file.name) for file in files]
    return all(numbers) and all(int(match[2]) == len(files) for match in numbers if match)


def _tgi_settings(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_manifest(checkpoint_files(folder))
    except CheckpointError:
        return {}  # the caller's message about missing settings helps more
    if not all(name in manifest and manifest[name].numel == 1 for name in TGI_TENSORS):
        return {}
    bits, group_size = (read_tensor(manifest[name]).flatten()[0].item() for name in TGI_TENSORS)
    return {"quant_method": "gptq", "bits": as_integer(bits), "group_size": as_integer(group_size)}
