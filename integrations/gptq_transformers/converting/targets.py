"""The formats that can be written: a layer's tensors, and the settings that their readers need."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from gptq_backend import ConfigError, QuantizeConfig, QuantizedWeight
from gptq_backend.format import EMBEDDINGS, check_planes, encode, write_awq, write_compressed_tensors

from ..loading.prepare import name_patterns


class Kind(NamedTuple):
    """What of a quantized layer the settings name."""

    bits: int
    group_size: int  # -1 for a single group
    sym: bool
    desc_act: bool

    @classmethod
    def of(cls, weight: QuantizedWeight) -> Kind:
        size = int(torch.bincount(weight.g_idx.long()).max())
        trivial = torch.arange(len(weight.g_idx), dtype=torch.int32) // size
        sym = bool((weight.zeros == 1 << (weight.bits - 1)).all())
        real = not torch.equal(weight.g_idx.cpu(), trivial)
        return cls(weight.bits, -1 if len(weight.scales) == 1 else size, sym, real)


class Target(NamedTuple):
    """A format.

    Args:
        encode: a layer's name and weight -> its tensors. Raises ConfigError where the format cannot hold it.
        settings: of the checkpoint, from the kinds of its quantized layers, the names of its dense ones, and what a
            GPTQ checkpoint said; None for one that is not quantized. Raises ConfigError likewise.
    """

    encode: Callable[[str, QuantizedWeight], dict[str, Tensor]]
    embeddings: bool  # whether it can hold quantized ones
    widens: bool  # whether codes of 5 to 7 bits become 8 bits wide, the same numbers, since it has none
    settings: Callable[[Mapping[str, Kind], Sequence[str], Mapping[str, Any]], dict[str, Any] | None]


def _gptq(checkpoint_format: str) -> Target:
    def write(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
        instead = "write another format, like --to gptq_v2 (to='gptq_v2' in Python)"
        check_planes(name, weight.codes.shape[::-1], weight.bits, checkpoint_format, instead)
        return encode(weight, checkpoint_format)[1]

    def settings(kinds: Mapping[str, Kind], dense: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
        common = _most_common(kinds)
        rules: dict[str, dict[str, Any]] = {}
        inside = {name for name in dense if re.search(r"\.\d+\.", name)}
        everything = [*kinds, *dense]
        for pattern in name_patterns(inside, everything):
            rules[f"-:^{pattern}"] = {}
        for kind in dict.fromkeys(kinds.values()):
            chosen = {name for name, own in kinds.items() if own == kind and kind != common}
            rules |= {f"+:^{pattern}": kind._asdict() for pattern in name_patterns(chosen, everything)}
        meant = {**common._asdict(), "checkpoint_format": checkpoint_format, "lm_head": "lm_head" in kinds}
        kept = QuantizeConfig.from_dict(known).to_dict() if known else {}
        # What may not hold any more.
        gone = {"act_group_aware", "static_groups", "pack_dtype", "dynamic"}
        embedding = next((kind for name, kind in kinds.items() if name.rpartition(".")[2] in EMBEDDINGS), None)
        gone |= {"embed_bits", "embed_group_size"} if embedding is None else set()
        kept = {key: value for key, value in kept.items() if key not in gone}
        if "embed_bits" in kept and embedding is not None:
            kept["embed_bits"] = embedding.bits
        kept |= {**meant, "dynamic": rules or None, "quant_method": "gptq", "format": checkpoint_format}
        return {key: value for key, value in kept.items() if value is not None}

    return Target(write, True, checkpoint_format != "gptq_p", settings)


def _awq(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    if name == "lm_head":
        raise ConfigError(
            "lm_head is quantized, expected it in 16 bits, as all readers of AWQ do; convert to gptq or "
            "compressed-tensors instead"
        )
    return write_awq(name, weight)


def _awq_settings(kinds: Mapping[str, Kind], dense: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
    sizes = {kind.group_size for kind in kinds.values()}
    if len(sizes) > 1:
        raise ConfigError(
            f"the layers have groups of {', '.join(map(str, sorted(sizes)))}, expected one size in an AWQ checkpoint; "
            "convert to gptq or compressed-tensors instead"
        )
    return {
        "quant_method": "awq",
        "bits": 4,
        "group_size": sizes.pop(),
        "version": "gemm",
        "zero_point": True,
        "modules_to_not_convert": _unquantized(kinds, dense),
    }


def _compressed_settings(kinds: Mapping[str, Kind], dense: Sequence[str], known: Mapping[str, Any]) -> dict[str, Any]:
    groups = {}
    for number, kind in enumerate(dict.fromkeys(kinds.values())):
        names = [name for name, own in kinds.items() if own == kind]
        weights = {
            "num_bits": kind.bits,
            "type": "int",
            "symmetric": kind.sym,
            "strategy": "channel" if kind.group_size == -1 else "group",
            "group_size": None if kind.group_size == -1 else kind.group_size,
            "actorder": "group" if kind.desc_act else None,
            "dynamic": False,
        }
        targets = ["Linear"] if len(set(kinds.values())) == 1 else names
        parts = {"input_activations": None, "output_activations": None, "format": "pack-quantized"}
        groups[f"group_{number}"] = {"targets": targets, "weights": weights, **parts}
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": _unquantized(kinds, dense),
    }


def _unquantized(kinds: Mapping[str, Kind], dense: Sequence[str]) -> list[str]:
    """Names of linear layers that stay dense; a head that is tied has no tensor of its own."""
    names = [name for name in dense if name.rpartition(".")[2] not in EMBEDDINGS]
    return names if "lm_head" in (*names, *kinds) else [*names, "lm_head"]


def _compressed(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    if len(weight.g_idx) % len(weight.scales):
        raise ConfigError(
            f"{name} has {len(weight.scales)} groups for {len(weight.g_idx)} inputs, expected groups of one size in a "
            "compressed-tensors checkpoint; convert to gptq instead"
        )
    return write_compressed_tensors(weight)


def _bf16(name: str, weight: QuantizedWeight) -> dict[str, Tensor]:
    return {"weight": weight.dequantize(torch.float32).to(torch.bfloat16)}


def _most_common(kinds: Mapping[str, Kind]) -> Kind:
    return Counter(kinds.values()).most_common(1)[0][0]


TARGETS = {
    "gptq": _gptq("gptq"),
    "gptq_v2": _gptq("gptq_v2"),
    "gptq_p": _gptq("gptq_p"),
    "awq": Target(_awq, False, False, _awq_settings),
    "compressed-tensors": Target(_compressed, False, True, _compressed_settings),
    "bf16": Target(_bf16, False, False, lambda kinds, dense, known: None),
}
