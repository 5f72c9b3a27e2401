"""One spec per quantized layer of a checkpoint, from the names, dtypes and shapes of its tensors.

The manifest decides which layers are quantized and how, from the shapes of what is stored. The config is only
cross-checked: published configs miss ``dynamic`` rules, list wrong modules and mislabel formats.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Collection, Mapping

import torch

from ..config import FORMATS, PLANAR_ONLY_BITS, QuantizeConfig
from ..errors import CheckpointError
from .foreign import settings_of
from .headers import Manifest, TensorInfo, read_tensor
from .layout import FLOATS, INDICES
from .stored_tensors import StoredSpec, check_groups

logger = logging.getLogger(__name__)

_WORDS = (torch.int32, torch.int8, torch.int16, torch.int64)
_PARTS = ("qweight", "qzeros", "scales")


def quantized_modules(manifest: Manifest) -> list[str]:
    """Names of the layers that have a ``qweight``, in the order of the file."""
    return [name.removesuffix(".qweight") for name in manifest if name.endswith(".qweight")]


def resolve_specs(
    manifest: Manifest,
    config: QuantizeConfig,
    linear_shapes: Mapping[str, tuple[int, int]] | None = None,
    biased: Collection[str] | None = None,
) -> dict[str, StoredSpec]:
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


def _warn_once_for_all(
    specs: Mapping[str, StoredSpec], configs: Mapping[str, QuantizeConfig], manifest: Manifest
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
    if (own := settings_of(manifest[f"{name}.qweight"], config)) is not None:
        return own
    for candidate in (manifest[f"{name}.qweight"].key.removesuffix(".qweight"), name):
        found = config.for_module(candidate)
        if found is not None and found is not config:
            return found
    return config


def _resolve(
    name: str, manifest: Manifest, config: QuantizeConfig, shape: tuple[int, int] | None, has_bias: bool | None
) -> StoredSpec:
    parts = {part: manifest[f"{name}.{part}"] for part in _PARTS if f"{name}.{part}" in manifest}
    for part in _PARTS:
        if part not in parts:
            raise CheckpointError(
                f"{name}: {part} is missing, expected {', '.join(_PARTS)}; fetch the checkpoint again or export it anew"
            )
        _check_dtype(name, part, parts[part], FLOATS if part == "scales" else _WORDS)
        if len(parts[part].shape) != 2 or 0 in parts[part].shape:
            raise CheckpointError(f"{name}.{part} has shape {list(parts[part].shape)}, expected a non-empty matrix")
    qweight, scales = parts["qweight"], parts["scales"]
    stored_g_idx = manifest.get(f"{name}.g_idx")
    g_idx = stored_g_idx if stored_g_idx is not None and stored_g_idx.numel else None  # an empty one says nothing
    if g_idx is not None:
        _check_dtype(name, "g_idx", g_idx, INDICES)
    word_bits = qweight.dtype.itemsize * 8  # type: ignore[union-attr]
    if shape:
        _check_sizes(name, shape, qweight, scales, g_idx)
        features = shape[0]
    elif g_idx is not None:
        features = g_idx.numel
    else:  # the zeros tell the bits: they lie along the outputs, of which the number is known
        config = dataclasses.replace(config, bits=_width(qweight.shape[1], parts["qzeros"].shape[1], config, word_bits))
        features = qweight.shape[0] * word_bits // config.bits
    bits = _bits(name, qweight, features, config, word_bits)
    groups = scales.shape[0]
    spec = StoredSpec(
        in_features=features,
        out_features=qweight.shape[1],
        bits=bits,
        group_size=_group_size(name, features, groups, g_idx, config),
        groups=groups,
        zero_offset=FORMATS[config.checkpoint_format].zero_offset,
        planar=bits in FORMATS[config.checkpoint_format].planar_bits,
        sym=config.sym,
        act_order=config.desc_act and not config.static_groups,
        has_g_idx=g_idx is not None,
        empty_g_idx=stored_g_idx is not g_idx,
        has_bias=_has_bias(name, manifest, has_bias),
        word_dtype=qweight.dtype or torch.int32,
        scales_dtype=scales.dtype or torch.float16,
        bias_dtype=_dtype(manifest.get(f"{name}.bias"), torch.float16),
        g_idx_dtype=_dtype(stored_g_idx, torch.int32),
    )
    _check_shapes(name, spec, manifest)
    return spec


def _width(count: int, words: int, config: QuantizeConfig, word_bits: int) -> int:
    """Of ``count`` codes in so many words: what the config says, if that can be."""
    widths = config.bits, *FORMATS[config.checkpoint_format].bits
    fitting = (bits for bits in widths if math.ceil(count * bits / word_bits) == words)
    return next(fitting, config.bits)


def _check_sizes(
    name: str, shape: tuple[int, int], qweight: TensorInfo, scales: TensorInfo, g_idx: TensorInfo | None
) -> None:
    """Against the model's layer. Comes first: 96 inputs of 4 bits fill as many words as 128 of 3 bits."""
    features = shape[0] if g_idx is None else g_idx.numel
    if (features, qweight.shape[1], scales.shape[1]) != (*shape, shape[1]):
        hint = ", or its scales have another layout than GPTQ's: export it anew" if scales.shape[1] == 1 else ""
        raise CheckpointError(
            f"{name}: the checkpoint has {features} inputs, {qweight.shape[1]} outputs and {scales.shape[1]} columns "
            f"of scales, the model {shape[0]} inputs and {shape[1]} outputs; config.json and the weights belong to "
            f"different models{hint}"
        )


def _check_shapes(name: str, spec: StoredSpec, manifest: Manifest) -> None:
    for part, expected in spec.shapes.items():
        found = manifest[f"{name}.{part}"]
        if found.shape != expected and not (part == "g_idx" and spec.empty_g_idx):
            raise CheckpointError(
                f"{name}.{part} has shape {list(found.shape)}, expected {list(expected)} for a {spec.bits}-bit layer "
                f"with {spec.in_features} inputs, {spec.out_features} outputs and {spec.groups} groups; fetch the "
                "checkpoint again or export it anew"
            )
    if spec.bits in PLANAR_ONLY_BITS and (spec.in_features % 32 or spec.out_features % 32):
        raise CheckpointError(
            f"{name} has {spec.in_features} inputs and {spec.out_features} outputs, expected multiples of 32 in planes "
            f"of {spec.bits} bits; export the checkpoint anew"
        )
    if manifest[f"{name}.qzeros"].dtype != spec.word_dtype:
        raise CheckpointError(
            f"{name}.qzeros is {manifest[f'{name}.qzeros'].dtype}, expected {spec.word_dtype} as qweight; "
            "export it anew"
        )


def _bits(name: str, qweight: TensorInfo, features: int, config: QuantizeConfig, word_bits: int) -> int:
    rows = qweight.shape[0]
    fitting = [bits for bits in range(1, 17) if math.ceil(features * bits / word_bits) == rows]
    widths = FORMATS[config.checkpoint_format].bits
    if config.bits in fitting and config.bits in PLANAR_ONLY_BITS and config.bits not in widths:
        raise CheckpointError(
            f"{name} has {config.bits}-bit codes, which checkpoint_format={config.checkpoint_format!r} cannot hold, "
            "expected 'gptq_p'; correct checkpoint_format in the config, or export the checkpoint anew"
        )
    if config.bits in fitting:
        return config.bits
    supported = [bits for bits in fitting if bits in widths]
    if len(supported) == 1:
        return supported[0]
    found = f"{fitting[0]}-bit codes" if fitting else "codes of no whole width"
    raise CheckpointError(
        f"{name}.qweight: {rows} words for {features} inputs make {found}, expected {config.bits} bits (supported: "
        f"{widths}); config.json and the weights belong to different models, or the format is another"
    )


def _group_size(name: str, features: int, groups: int, g_idx: TensorInfo | None, config: QuantizeConfig) -> int:
    """Channels per group without act-order."""
    claimed = claimed_group_size(features, config)
    if math.ceil(features / claimed) == groups:
        return claimed
    if features % groups == 0:
        return features // groups
    if g_idx is not None and g_idx.numel == features:
        values = read_tensor(g_idx)
        check_groups(f"{name}.g_idx", values, groups)  # before the largest sizes what is counted
        return int(torch.bincount(values.long()).max())
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
    _check_dtype(name, "bias", stored, (*FLOATS, torch.float64))
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
    """Raises CheckpointError for parts of a layer without its qweight."""
    for name in manifest:
        layer, _, part = name.rpartition(".")
        if f"{layer}.qweight" in manifest:
            continue
        if part in ("qzeros", "g_idx"):
            raise CheckpointError(
                f"{layer}: {part} is stored without qweight; fetch the checkpoint again or export it anew"
            )
