"""What the settings of AWQ, AutoRound, compressed-tensors and Marlin checkpoints are in GPTQ's words.

The tensors say nearly everything (``format/foreign.py``). What is read here is what they do not tell: whether a layout
is one that is known, and whether its weights are all that is quantized.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Any

from .config_fields import held_bits
from .dialects import as_flag, as_integer, canonical
from .errors import ConfigError

# The layouts of AWQ's files. exllama and ipex were ways to run what GEMM had stored.
_AWQ_VERSIONS = ("gemm", "exllama", "ipex", "gemv", "gemv_fast")
_AUTO_ROUND = ("gptq", "awq", "exllama", "triton", "auto_round")  # one of which its packing is called by,
_NOT_THESE = ("fake", "llm_compressor", "fp", "mlx")  # unless by one of these, too
WIDTHS = "stored_bits"  # the key that the settings keep the widths of compressed-tensors' codes under
AWQ_VERSION = "awq_version"  # the key that the settings keep it under, where the tensors do not tell


def gptq_settings(source: Mapping[str, Any]) -> Mapping[str, Any]:
    """Settings of any quantized checkpoint that can be read here, as if GPTQ had made it; its own as they are.

    Raises:
        ConfigError: ``source`` is not a mapping, or its method or layout is not known here, with what to do about it.
    """
    if not isinstance(source, Mapping):
        raise ConfigError(
            f"quantization_config is {_shown(source)}, expected an object with bits, group_size and so on; correct the "
            "config file or fetch it again"
        )
    method = method_of(source)
    if method == "gptq":
        return source
    if method not in _READERS:
        raise ConfigError(
            f"quant_method={_shown(method)} is not supported, expected 'gptq' or one of {sorted(_READERS)}; load the "
            "checkpoint with a library for that method"
        )
    return _READERS[method](source)


def method_of(source: Mapping[str, Any]) -> str:
    """Who made a checkpoint, by its settings: a key of those that are read here, or another tool's name."""
    values = canonical(source)
    implied = "awq" if {"zero_point", "version"} <= source.keys() else "gptq"  # AutoAWQ's quant_config.json names none
    method = str(getattr(values.get("quant_method"), "value", values.get("quant_method") or implied)).lower()
    if "marlin" in (method, values.get("checkpoint_format")) or source.get("is_marlin_format"):
        return "marlin"
    return method.removeprefix("intel/")


def _marlin(source: Mapping[str, Any]) -> dict[str, Any]:
    values = canonical(source)
    return {"bits": 4, "group_size": values.get("group_size", -1), "sym": True, "checkpoint_format": "gptq_v2"}


def _awq(source: Mapping[str, Any]) -> dict[str, Any]:
    values = canonical(source)
    version = str(getattr(source.get("version"), "value", source.get("version") or "gemm")).lower()
    version = str(values.get("checkpoint_format", version)).lower()  # GPTQModel's name for it
    version = "gemm" if version in ("awq", "gptq") else version.replace("-", "_")
    if version not in _AWQ_VERSIONS:
        raise ConfigError(
            f"version={version!r} is not a layout of AWQ that is known here, expected one of {_AWQ_VERSIONS}; export "
            "the checkpoint with AutoAWQ's version='gemm'"
        )
    return {
        "bits": values.get("bits", 4),
        "group_size": values.get("group_size", 128),
        "sym": not as_flag(values.get("zero_point", True)),
        "checkpoint_format": "gptq_v2",
        **({AWQ_VERSION: version} if version == "gemv" else {}),
    }


def _auto_round(source: Mapping[str, Any]) -> dict[str, Any]:
    values = canonical(source)
    packing = str(values.get("packing_format") or values.get("backend") or "auto_round:auto_gptq").lower()
    integers = str(values.get("data_type", "int")) == "int"
    if not integers or not any(word in packing for word in _AUTO_ROUND) or any(word in packing for word in _NOT_THESE):
        raise ConfigError(
            f"packing_format={packing!r} with data_type={values.get('data_type', 'int')!r} is not known here, expected "
            "integers in auto_round:auto_gptq, auto_round:auto_awq or auto_round; export the checkpoint again with "
            "AutoRound's format='auto_gptq'"
        )
    if (as_integer(values.get("act_bits")) or 16) < 16:
        raise _activations(f"act_bits={values['act_bits']}")
    # Only those that say auto_gptq store a zero less one.
    less_one = "gptq" in packing and "gptqmodel" not in packing
    out: dict[str, Any] = {key: values[key] for key in ("bits", "group_size", "sym") if key in values}
    if isinstance(layers := values.get("extra_config"), Mapping):
        rules = [_auto_round_rule(str(name), rule) for name, rule in layers.items() if isinstance(rule, Mapping)]
        out["dynamic"] = dict(rules) or None
    return {**out, "checkpoint_format": "gptq" if less_one else "gptq_v2"}


def _auto_round_rule(name: str, rule: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """An entry of ``extra_config``, by a name or a pattern, as one of ``dynamic``."""
    pattern = name if re.search(r"[*\\^$|+]", name) else f"{re.escape(name)}$"
    own = canonical(rule)
    if (as_integer(own.get("bits")) or 4) >= 16:
        return f"-:{pattern}", {}
    return f"+:{pattern}", {key: own[key] for key in ("bits", "group_size", "sym") if key in own}


def _compressed_tensors(source: Mapping[str, Any]) -> dict[str, Any]:
    groups = source.get("config_groups")
    schemes = [each for each in groups.values() if isinstance(each, Mapping)] if isinstance(groups, Mapping) else []
    weights = [each.get("weights") for each in schemes]
    layout = str(source.get("format", "pack-quantized"))
    own = {str(each.get("format") or "pack-quantized") for each in schemes}
    packed = layout in ("pack-quantized", "mixed-precision") and own == {"pack-quantized"}
    integers = [each for each in weights if isinstance(each, Mapping) and each.get("type", "int") == "int"]
    if not packed or not integers or len(integers) != len(schemes):
        raise ConfigError(
            f"format={' with '.join(sorted({layout, *own}))!r} of compressed-tensors is not known here, expected "
            "'pack-quantized' with integer weights (W4A16, W8A16); load it with vLLM, or with transformers and the "
            "package compressed-tensors"
        )
    if any(each.get(f"{side}_activations") for each in schemes for side in ("input", "output")):
        raise _activations("input_activations or output_activations of compressed-tensors")
    sparse = source.get("sparsity_config")
    if isinstance(sparse, Mapping) and str(sparse.get("format") or "dense") != "dense":
        raise ConfigError(
            f"sparsity_config of compressed-tensors has format={sparse['format']!r}, expected 'dense'; load the "
            "checkpoint with vLLM, or with transformers and the package compressed-tensors"
        )
    if isinstance(rotations := source.get("transform_config"), Mapping) and rotations.get("config_groups"):
        raise ConfigError(
            "transform_config of compressed-tensors rotates what goes into layers, which is not done here; load the "
            "checkpoint with vLLM, or with transformers and the package compressed-tensors"
        )
    first = integers[0]
    size = first.get("group_size")
    bits = as_integer(first.get("num_bits", 4))
    widths = {as_integer(each.get("num_bits", 4)) for each in integers}
    # What is said of all layers, so that one that stores something else is damaged.
    return {
        "bits": held_bits(bits) if isinstance(bits, int) and bits > 0 else bits,
        "group_size": -1 if size is None else size,
        "sym": any(as_flag(each.get("symmetric", True)) for each in integers),
        "desc_act": all(str(each.get("actorder") or "").lower() in ("group", "true") for each in integers),
        "checkpoint_format": "gptq_v2",
        WIDTHS: sorted(width for width in widths if width in range(1, 9)),
    }


def _activations(what: str) -> ConfigError:
    return ConfigError(
        f"{what}: the checkpoint quantizes activations too, expected weights only; use one with activations in 16 bits"
    )


_READERS: dict[str, Callable[[Mapping[str, Any]], dict[str, Any]]] = {
    "awq": _awq,
    "auto-round": _auto_round,
    "compressed-tensors": _compressed_tensors,
    "marlin": _marlin,
}
METHODS = ("gptq", *_READERS)


def _shown(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
