"""What a user should know of a checkpoint: where its config and its tensors disagree, and what else is in it.

Each finder takes a checkpoint as :mod:`checkpoint` reads it and yields sentences. None of them is an error: the tensors
decide, and the checkpoint loads. What cannot be loaded is damage, which is reported separately.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from gptq_backend import CheckpointError, ConfigError, QuantizeConfig
from gptq_backend.foreign_settings import METHODS as READABLE
from gptq_backend.foreign_settings import method_of
from gptq_backend.format import SETTINGS_FILES, claimed_group_size, read_tensor, settings_in, settings_of

from .checkpoint import Checkpoint, Layer
from .formatting import name_pattern

_PARTS = {"qweight", "qzeros", "scales", "g_idx", "bias"}
_COMPARED = ("bits", "group_size", "sym", "desc_act", "checkpoint_format", "lm_head")


def find(checkpoint: Checkpoint) -> list[str]:
    """All warnings, as sentences."""
    return [sentence for finder in _FINDERS for sentence in finder(checkpoint)]


def _where_settings_are(checkpoint: Checkpoint) -> Iterator[str]:
    """Transformers reads config.json only; other files may say something else."""
    found = {name: settings for name in SETTINGS_FILES if (settings := _settings(checkpoint.folder / name))}
    if "config.json" not in found:
        yield (
            f"the quantization settings are in {next(iter(found), 'the tensors')}, not in config.json: plain "
            "from_pretrained does not see them; load with gptq_transformers.from_quantized"
        )
    elif (method := found["config.json"].get("quant_method")) not in READABLE:
        yield (
            f"quant_method is {method!r} in config.json, not 'gptq': plain from_pretrained fails or leaves random "
            "weights; load with gptq_transformers.from_quantized"
        )
    first, *others = found.items() if found else [("", {})]
    for name, settings in others:
        try:
            ours, theirs = QuantizeConfig.from_dict(first[1]), QuantizeConfig.from_dict(settings)
        except ConfigError as error:
            yield f"{name} cannot be used: {error}"
            continue
        for key in _COMPARED:
            if getattr(ours, key) != getattr(theirs, key):
                yield f"{key} is {getattr(ours, key)} in {first[0]} (used) and {getattr(theirs, key)} in {name}"


def _settings(path: Path) -> dict[str, Any]:
    try:
        return settings_in(path)
    except CheckpointError:
        return {}  # of the file that is used, reading has complained already


def _files(checkpoint: Checkpoint) -> Iterator[str]:
    names = [file.name for file in checkpoint.files]
    if any(not name.endswith(".safetensors") for name in names):
        yield f"the weights are pickled ({_some(names)}); safetensors would be safer and faster to load"
    elif not any(name.startswith("model") for name in names):
        yield f"the weights are in {_some(names)}, a name that plain from_pretrained does not look for"
    if checkpoint.settings.get("autoround_version"):
        yield f"exported by AutoRound {checkpoint.settings['autoround_version']}"


def _format(checkpoint: Checkpoint) -> Iterator[str]:
    spec_format = checkpoint.config.checkpoint_format
    if method_of(checkpoint.settings) == "gptq" and not {"checkpoint_format", "format"} & checkpoint.settings.keys():
        yield f"no checkpoint_format in the settings; read as {spec_format}"
    wrong = [layer for layer in checkpoint.layers if layer.spec.zero_offset != layer.claimed.zero_offset]
    if wrong:
        actual = "zeros as they are (gptq_v2)" if wrong[0].spec.zero_offset == 0 else "zeros minus one (gptq)"
        yield (
            f"checkpoint_format is {spec_format}, but {_count(wrong, checkpoint)} store {actual}: mislabelled zeros; "
            "they are symmetric, so they are read correctly here"
        )
    words = {layer.spec.word_dtype for layer in checkpoint.layers} - {torch.int32}
    for dtype in sorted(map(str, words)):
        yield f"codes are packed in {dtype.removeprefix('torch.')} instead of int32"


def _grid(checkpoint: Checkpoint) -> Iterator[str]:
    layers = checkpoint.layers
    asymmetric = [layer for layer in layers if layer.claimed.sym and not layer.spec.sym]
    if asymmetric:
        yield f"sym is true, but the zeros of {_count(asymmetric, checkpoint)} vary; they are used as asymmetric"
    for key in ("bits", "group_size"):
        differing = [layer for layer in layers if getattr(layer.spec, key) != _expected(checkpoint, layer, key)]
        if differing:
            values = sorted({getattr(layer.spec, key) for layer in differing})
            yield f"{_count(differing, checkpoint)} have {key} {_some(values)} by their shapes, unlike in the config"


def _expected(checkpoint: Checkpoint, layer: Layer, key: str) -> int:
    config = _claims(checkpoint, layer)
    if key == "bits":
        return config.bits
    return claimed_group_size(layer.spec.in_features, config)


def _claims(checkpoint: Checkpoint, layer: Layer) -> QuantizeConfig:
    """What the settings say of a layer; in words of its own, where another tool stored it."""
    own = settings_of(checkpoint.manifest[f"{layer.name}.qweight"], checkpoint.config)
    return own or checkpoint.config.for_module(layer.name) or checkpoint.config


def _act_order(checkpoint: Checkpoint) -> Iterator[str]:
    layers = checkpoint.layers

    def flagged(layer: Layer) -> bool:
        return _claims(checkpoint, layer).desc_act

    trivial = [layer for layer in layers if flagged(layer) and not layer.spec.act_order and layer.spec.groups > 1]
    if trivial:
        which = _count(trivial, checkpoint)
        yield f"desc_act is true, but the g_idx of {which} is trivial (as with static groups): no act-order"
    real = [layer for layer in layers if layer.spec.act_order and not flagged(layer)]
    if real:
        yield f"desc_act is false, but {_count(real, checkpoint)} have a real g_idx: they are act-order"
    empty = [layer for layer in layers if layer.spec.empty_g_idx]
    if empty:
        yield f"the g_idx of {_count(empty, checkpoint)} is empty; read as trivial"


def _which_modules(checkpoint: Checkpoint) -> Iterator[str]:
    """Quantized or not, against the config's rules and lists."""
    config, layers = checkpoint.config, checkpoint.layers
    skipped = [layer for layer in layers if config.for_module(layer.name) is None]
    if skipped:
        yield f"{_count(skipped, checkpoint)} are quantized, though a dynamic rule skips them"
    has_head = any(layer.name.rpartition(".")[2] in ("lm_head", "embed_out", "output") for layer in layers)
    if config.lm_head != has_head:
        yield f"lm_head is {str(config.lm_head).lower()}, but lm_head is {'' if has_head else 'not '}quantized"
    if wanted := config.modules_in_block_to_quantize:
        inside = (re.search(r"\.\d+\.(.+)", layer.name) for layer in layers)
        kinds = {match[1] for match in inside if match}
        if extra := sorted(kinds - set(wanted)):
            yield f"{_some(extra)} quantized, but not in modules_in_block_to_quantize"
        if missing := sorted(set(wanted) - kinds):
            yield f"{_some(missing)} in modules_in_block_to_quantize, but quantized nowhere"
    yield from _mixed(checkpoint)


def _mixed(checkpoint: Checkpoint) -> Iterator[str]:
    """Kinds of modules that are quantized in some blocks and dense in others, which no rule explains."""
    quantized = Counter(name_pattern(layer.name) for layer in checkpoint.layers)
    dense: dict[str, list[str]] = {}
    for name in (key.removesuffix(".weight") for key in checkpoint.manifest if key.endswith(".weight")):
        if name_pattern(name) in quantized and checkpoint.config.for_module(name) is not None:
            dense.setdefault(name_pattern(name), []).append(name)
    for pattern, names in dense.items():
        yield f"{pattern} is quantized {quantized[pattern]} times and in 16 bits {len(names)} times ({_some(names)})"


def _biases(checkpoint: Checkpoint) -> Iterator[str]:
    zero: list[Layer] = []
    other: list[Layer] = []
    for layer in checkpoint.layers:
        stored = checkpoint.manifest.get(f"{layer.name}.bias")
        if stored is not None and layer.name in checkpoint.unbiased:
            (other if read_tensor(stored).any() else zero).append(layer)
    if zero:
        yield f"{_count(zero, checkpoint)} have a bias of zeros, though the model has none; it is dropped"
    if other:
        yield f"{_count(other, checkpoint)} have a bias that is not zero, though the model has none; it is added"


def _structure(checkpoint: Checkpoint) -> Iterator[str]:
    if checkpoint.unknown:
        yield f"the model's structure is not known ({checkpoint.unknown}): shapes and names were not checked against it"
    if checkpoint.skipped:
        names = _some(checkpoint.skipped)
        yield f"{len(checkpoint.skipped)} quantized modules that the model does not have, ignored: {names}"


def _extras(checkpoint: Checkpoint) -> Iterator[str]:
    names = {layer.name for layer in checkpoint.layers}
    extras = [key for key in checkpoint.manifest if key.rpartition(".")[0] in names and _part(key) not in _PARTS]
    if extras:
        yield f"{len(extras)} tensors beside those of GPTQ, ignored: {_some(extras)}"
    scalars = [key for key in checkpoint.manifest if key in ("gptq_bits", "gptq_groupsize")]
    if scalars:
        yield f"settings stored as tensors by text-generation-inference: {_some(scalars)}"


def _part(key: str) -> str:
    return key.rpartition(".")[2]


def _count(layers: Sequence[Layer], checkpoint: Checkpoint) -> str:
    """Which modules, briefly."""
    if len(layers) == len(checkpoint.layers):
        return f"all {len(layers)} modules"
    return f"{len(layers)} of {len(checkpoint.layers)} modules ({_some([layer.name for layer in layers])})"


def _some(values: Sequence[Any]) -> str:
    shown = ", ".join(str(value) for value in values[:3])
    return shown + (", ..." if len(values) > 3 else "")


_FINDERS: tuple[Callable[[Checkpoint], Iterator[str]], ...] = (
    _where_settings_are,
    _files,
    _format,
    _grid,
    _act_order,
    _which_modules,
    _biases,
    _structure,
    _extras,
)
