"""Read a checkpoint: its settings, its files, and one spec per quantized layer.

The manifest decides which layers are quantized and how, from the shapes of what is stored. The config is only
cross-checked: published configs miss ``dynamic`` rules, list wrong modules and mislabel formats.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import torch

from .config import SUPPORTED_BITS, QuantizeConfig, canonical
from .errors import CheckpointError, ConfigError
from .manifest import FETCH_AGAIN, Manifest, TensorInfo, read_manifest, read_tensor
from .weight import LinearSpec

__all__ = [
    "TGI_TENSORS",
    "Manifest",
    "TensorInfo",
    "checkpoint_files",
    "claimed_group_size",
    "embedded_settings",
    "quantized_modules",
    "read_config",
    "read_manifest",
    "read_settings",
    "read_tensor",
    "resolve_specs",
]

logger = logging.getLogger(__name__)

SETTINGS_FILES = ("config.json", "quantize_config.json", "quant_config.json")
# Two scalars that text-generation-inference stored instead of a config.
TGI_TENSORS = ("gptq_bits", "gptq_groupsize")

_WORDS = (torch.int32, torch.int8, torch.int16, torch.int64)
_SCALES = (torch.float16, torch.bfloat16, torch.float32)
_PARTS = ("qweight", "qzeros", "scales")


def read_config(folder: str | Path) -> QuantizeConfig:
    """The settings of the checkpoint in ``folder``, see :func:`read_settings`."""
    return QuantizeConfig.from_dict(read_settings(folder))


def read_settings(folder: str | Path) -> dict[str, Any]:
    """The quantization settings as written: from config.json, else from quantize_config.json or quant_config.json.

    Raises:
        ConfigError: there are none. CheckpointError: a file is not JSON, or holds no object.
    """
    folder = Path(folder)
    for name in SETTINGS_FILES:
        if not (folder / name).is_file():
            continue
        content = _read_json(folder / name)
        if name == "config.json":
            content = embedded_settings(content)
        if not isinstance(content, dict):
            raise CheckpointError(f"{folder / name}: quantization_config is {content!r}, expected an object")
        if content:
            return content
    if folder.is_dir() and (scalars := _tgi_settings(folder)):
        return scalars
    raise ConfigError(
        f"{folder} has no quantization settings: expected quantization_config in config.json, or quantize_config.json; "
        "if the checkpoint is quantized, add a quantize_config.json with bits, group_size, desc_act and sym"
    )


def embedded_settings(config: Mapping[str, Any]) -> Any:
    """The quantization settings in the content of a config.json, or in its ``text_config``; {} if there are none."""
    sections = (config, config.get("text_config") or {})
    return next(filter(None, (section.get("quantization_config") for section in sections)), {})


def checkpoint_files(folder: str | Path, settings: Mapping[str, Any] | None = None) -> list[Path]:
    """The files that hold the weights: by index, by standard name, by AutoGPTQ's name, or the only one there is.

    Args:
        folder: the checkpoint.
        settings: its quantization settings, which may name the file (``model_basename``).

    Raises:
        CheckpointError: none, several that nothing tells apart, or a shard is missing.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} is not a folder; expected one with a checkpoint's files")
    for stem, suffix in (("model", ".safetensors"), ("pytorch_model", ".bin")):
        index = folder / f"{stem}{suffix}.index.json"
        if index.is_file():
            return _sharded(index)
        candidates = [f"{stem}{suffix}", *_autogptq_names(settings or {}, suffix)]
        for name in candidates:
            if (folder / name).is_file():
                return [folder / name]
        found = sorted(path for path in folder.glob(f"*{suffix}") if not path.name.startswith(("adapter_", ".")))
        if len(found) == 1 or (found and _complete_shards(found)):
            return found
        if found:
            names = ", ".join(path.name for path in found)
            raise CheckpointError(
                f"{folder} holds several weight files ({names}) and no index; name one in quantize_config.json as "
                "model_basename, or remove the others"
            )
    raise CheckpointError(f"{folder} holds no *.safetensors and no *.bin file; fetch the checkpoint's weights")


def quantized_modules(manifest: Manifest) -> list[str]:
    """Names of the layers that have a ``qweight``, in the order of the file."""
    return [name.removesuffix(".qweight") for name in manifest if name.endswith(".qweight")]


def resolve_specs(
    manifest: Manifest,
    config: QuantizeConfig,
    linear_shapes: Mapping[str, tuple[int, int]] | None = None,
    biased: Collection[str] | None = None,
) -> dict[str, LinearSpec]:
    """One spec per quantized layer.

    Args:
        manifest: by the names that ``linear_shapes`` uses.
        config: cross-checked; decides only what shapes do not tell (the meaning of zeros, planes, sym).
        linear_shapes: (in_features, out_features) of the model's linear layers, as :func:`structure.linear_shapes`
            finds them; layers that are not among them are left out. None: all layers, shapes as stored.
        biased: those of them that have a bias; None: as stored.

    Raises:
        CheckpointError: tensors are missing or do not fit together or to the model, with the layer's name.
    """
    _refuse_marlin(manifest)
    _check_orphans(manifest)
    specs, configs = {}, {}
    for name in quantized_modules(manifest):
        if linear_shapes is not None and name not in linear_shapes:
            continue
        shape = None if linear_shapes is None else linear_shapes[name]
        has_bias = None if biased is None else name in biased
        configs[name] = _layer_config(name, manifest, config)
        specs[name] = _resolve(name, manifest, configs[name], shape, has_bias)
    _warn_once_for_all(specs, configs, manifest)
    return specs


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not valid JSON ({error}); {FETCH_AGAIN}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, expected an object; {FETCH_AGAIN}")
    return content


def _tgi_settings(folder: Path) -> dict[str, Any]:
    try:
        manifest = read_manifest(checkpoint_files(folder))
    except CheckpointError:
        return {}  # the caller's message about missing settings helps more
    if not all(name in manifest for name in TGI_TENSORS):
        return {}
    bits, group_size = (int(read_tensor(manifest[name]).flatten()[0]) for name in TGI_TENSORS)
    return {"quant_method": "gptq", "bits": bits, "group_size": group_size}


def _autogptq_names(settings: Mapping[str, Any], suffix: str) -> list[str]:
    names = [f"{settings['model_basename']}{suffix}"] if settings.get("model_basename") else []
    found = canonical(settings)
    return [*names, f"gptq_model-{found.get('bits')}bit-{found.get('group_size')}g{suffix}"]


def _sharded(index: Path) -> list[Path]:
    weight_map = _read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{index} has no weight_map; {FETCH_AGAIN}")
    files = sorted({index.parent / str(name) for name in weight_map.values()})
    missing = [file.name for file in files if not file.is_file()]
    if missing:
        raise CheckpointError(
            f"{index.parent}: {len(missing)} of {len(files)} shards named in {index.name} are missing "
            f"({', '.join(missing[:3])}); fetch them"
        )
    return files


def _complete_shards(files: list[Path]) -> bool:
    numbers = [re.search(r"-(\d+)-of-(\d+)\.", file.name) for file in files]
    return all(numbers) and all(int(match[2]) == len(files) for match in numbers if match)


def _warn_once_for_all(
    specs: Mapping[str, LinearSpec], configs: Mapping[str, QuantizeConfig], manifest: Manifest
) -> None:
    """A wrong config is wrong for hundreds of layers: one line with an example."""
    wrong = [
        name
        for name, spec in specs.items()
        if spec.bits != configs[name].bits
        or spec.groups != math.ceil(spec.in_features / claimed_group_size(spec.in_features, configs[name]))
    ]
    if wrong:
        spec, config = specs[wrong[0]], configs[wrong[0]]
        logger.warning(
            "%d layers are stored otherwise than the config says, for example %s: %d bits in %d groups of %d, though "
            "the config says bits=%d and group_size=%d; what is stored counts",
            len(wrong), wrong[0], spec.bits, spec.groups, spec.group_size, config.bits, config.group_size,
        )  # fmt: skip
    double = [name for name in specs if f"{name}.weight" in manifest]
    if double:
        logger.warning(
            "%d layers have both a weight and a qweight, for example %s; the quantized one counts",
            len(double),
            double[0],
        )


def _layer_config(name: str, manifest: Manifest, config: QuantizeConfig) -> QuantizeConfig:
    """``dynamic`` rules were written for the names in the file; a newer framework may have renamed the modules."""
    for candidate in (manifest[f"{name}.qweight"].key.removesuffix(".qweight"), name):
        found = config.for_module(candidate)
        if found is not None and found is not config:
            return found
    return config


def _resolve(
    name: str, manifest: Manifest, config: QuantizeConfig, shape: tuple[int, int] | None, has_bias: bool | None
) -> LinearSpec:
    parts = {part: manifest[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in manifest}
    for part in _PARTS:
        if part not in parts:
            raise CheckpointError(
                f"{name}: {part} is missing, expected {', '.join(_PARTS)}; fetch the checkpoint again or export it anew"
            )
        _check_dtype(name, part, parts[part], _SCALES if part == "scales" else _WORDS)
        if len(parts[part].shape) != 2 or 0 in parts[part].shape:
            raise CheckpointError(f"{name}.{part} has shape {list(parts[part].shape)}, expected a non-empty matrix")
    qweight, scales = parts["qweight"], parts["scales"]
    g_idx = manifest.get(f"{name}.g_idx")
    if shape:
        _check_sizes(name, shape, qweight, scales, g_idx)
    word_bits = qweight.dtype.itemsize * 8  # type: ignore[union-attr]
    features = shape[0] if shape else _in_features(qweight, g_idx, config.bits, word_bits)
    bits = _bits(name, qweight, features, config, word_bits)
    groups = scales.shape[0]
    spec = LinearSpec(
        in_features=features,
        out_features=qweight.shape[1],
        bits=bits,
        group_size=_group_size(name, features, groups, g_idx, config),
        groups=groups,
        zero_offset=1 if config.checkpoint_format == "gptq" else 0,
        planar=config.checkpoint_format == "gptq_p" and bits == 3,
        sym=config.sym,
        has_g_idx=g_idx is not None and g_idx.numel > 0,
        empty_g_idx=g_idx is not None and g_idx.numel == 0,
        has_bias=_has_bias(name, manifest, has_bias),
        word_dtype=qweight.dtype or torch.int32,
        scales_dtype=scales.dtype or torch.float16,
        bias_dtype=_dtype(manifest.get(f"{name}.bias"), torch.float16),
        g_idx_dtype=_dtype(g_idx, torch.int32),
    )
    _check_shapes(name, spec, manifest)
    return spec


def _check_sizes(
    name: str, shape: tuple[int, int], qweight: TensorInfo, scales: TensorInfo, g_idx: TensorInfo | None
) -> None:
    """Against the model's layer. Comes first: 96 inputs of 4 bits fill as many words as 128 of 3 bits."""
    features = g_idx.numel if g_idx is not None and g_idx.numel else shape[0]
    if (features, qweight.shape[1], scales.shape[1]) != (*shape, shape[1]):
        hint = ", or its scales have another layout than GPTQ's: export it anew" if scales.shape[1] == 1 else ""
        raise CheckpointError(
            f"{name}: the checkpoint has {features} inputs, {qweight.shape[1]} outputs and {scales.shape[1]} columns "
            f"of scales, the model {shape[0]} inputs and {shape[1]} outputs; config.json and the weights belong to "
            f"different models{hint}"
        )


def _check_shapes(name: str, spec: LinearSpec, manifest: Manifest) -> None:
    for part, expected in spec.shapes.items():
        found = manifest[f"{name}.{part}"]
        if found.shape != expected and not (part == "g_idx" and spec.empty_g_idx):
            raise CheckpointError(
                f"{name}.{part} has shape {list(found.shape)}, expected {list(expected)} for a {spec.bits}-bit layer "
                f"with {spec.in_features} inputs, {spec.out_features} outputs and {spec.groups} groups; fetch the "
                "checkpoint again or export it anew"
            )
    if manifest[f"{name}.qzeros"].dtype != spec.word_dtype:
        raise CheckpointError(
            f"{name}.qzeros is {manifest[f'{name}.qzeros'].dtype}, expected {spec.word_dtype} as qweight; "
            "export it anew"
        )
    if spec.has_g_idx:
        _check_dtype(name, "g_idx", manifest[f"{name}.g_idx"], (torch.int32, torch.int64, torch.int16))


def _in_features(qweight: TensorInfo, g_idx: TensorInfo | None, bits: int, word_bits: int) -> int:
    return g_idx.numel if g_idx is not None and g_idx.numel else qweight.shape[0] * word_bits // bits


def _bits(name: str, qweight: TensorInfo, features: int, config: QuantizeConfig, word_bits: int) -> int:
    rows = qweight.shape[0]
    fitting = [bits for bits in range(1, 17) if math.ceil(features * bits / word_bits) == rows]
    if config.bits in fitting:
        return config.bits
    supported = [bits for bits in fitting if bits in SUPPORTED_BITS]
    if len(supported) == 1:
        return supported[0]
    found = f"{fitting[0]}-bit codes" if fitting else "codes of no whole width"
    raise CheckpointError(
        f"{name}.qweight: {rows} words for {features} inputs make {found}, expected {config.bits} bits (supported: "
        f"{SUPPORTED_BITS}); config.json and the weights belong to different models, or the format is another"
    )


def _group_size(name: str, features: int, groups: int, g_idx: TensorInfo | None, config: QuantizeConfig) -> int:
    """Channels per group without act-order."""
    claimed = claimed_group_size(features, config)
    if math.ceil(features / claimed) == groups:
        return claimed
    if features % groups == 0:
        return features // groups
    if g_idx is not None and g_idx.numel == features:
        return int(torch.bincount(read_tensor(g_idx).long().clamp_min(0)).max())
    raise CheckpointError(
        f"{name}.scales has {groups} rows, expected {math.ceil(features / claimed)} for {features} inputs in groups of "
        f"{claimed}; correct group_size in the config or fetch the checkpoint again"
    )


def claimed_group_size(features: int, config: QuantizeConfig) -> int:
    """Channels per group of a layer with so many inputs, as its settings say."""
    return features if config.group_size == -1 else min(config.group_size, features)


def _has_bias(name: str, manifest: Manifest, model_has_one: bool | None) -> bool:
    stored = manifest.get(f"{name}.bias")
    if stored is None:
        if model_has_one:
            raise CheckpointError(f"{name}: bias is missing, though the model has one; fetch the checkpoint again")
        return False
    _check_dtype(name, "bias", stored, (*_SCALES, torch.float64))
    if model_has_one is False:
        # Some exporters write a bias for every layer. Zeros mean nothing; others were computed and belong to the layer.
        return bool(read_tensor(stored).any())
    return True


def _check_dtype(name: str, part: str, info: TensorInfo, allowed: Collection[torch.dtype]) -> None:
    if info.dtype not in allowed:
        expected = ", ".join(str(dtype).removeprefix("torch.") for dtype in allowed)
        raise CheckpointError(f"{name}.{part} is {info.dtype}, expected one of {expected}; export the checkpoint anew")


def _dtype(info: TensorInfo | None, default: torch.dtype) -> torch.dtype:
    return default if info is None or info.dtype is None else info.dtype


def _check_orphans(manifest: Manifest) -> None:
    for name in manifest:
        layer, _, part = name.rpartition(".")
        if part in ("qzeros", "g_idx") and f"{layer}.qweight" not in manifest:
            raise CheckpointError(
                f"{layer}: {part} is stored without qweight; fetch the checkpoint again or export it anew"
            )


def _refuse_marlin(manifest: Manifest) -> None:
    for name in manifest:
        layer = name.removesuffix(".B")
        if layer != name and f"{layer}.s" in manifest and f"{layer}.qweight" not in manifest:
            raise CheckpointError(
                f"{layer} is serialized for Marlin (tensors B and s); that layout cannot be read here: use the GPTQ "
                "checkpoint that it was made from"
            )
