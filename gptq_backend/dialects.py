"""How published checkpoints and other tools spell settings -> our names, types and values."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

# Spellings found in published checkpoints -> ours.
ALIASES = {
    "w_bit": "bits",
    "wbits": "bits",
    "q_group_size": "group_size",
    "groupsize": "group_size",
    "format": "checkpoint_format",
    "method": "quant_method",
    "act_order": "desc_act",
    "percdamp": "damp_percent",
}
_INTEGER = re.compile(r"[+-]?\d{1,18}(\.0*)?")
_FLAGS = {"true": True, "false": False, "1": True, "0": False}


def canonical(source: Mapping[str, Any]) -> dict[str, Any]:
    """Keys in our spelling, without those whose value is None; an alias never overrides the canonical key."""
    out = {key: value for key, value in source.items() if key not in ALIASES and value is not None}
    for alias, key in ALIASES.items():
        if source.get(alias) is not None:
            out.setdefault(key, source[alias])
    if "checkpoint_format" in out:
        out["checkpoint_format"] = str(getattr(out["checkpoint_format"], "value", out["checkpoint_format"])).lower()
    if "pack_dtype" in out:
        out["pack_dtype"] = str(out["pack_dtype"]).removeprefix("torch.")
    return out


def as_integer(value: Any) -> Any:
    """``4`` for "4", "4.0" and 4.0, as JSON written by hand or by other languages has them; else ``value`` itself."""
    if isinstance(value, str) and _INTEGER.fullmatch(value.strip()):
        return int(value.strip().partition(".")[0])
    if isinstance(value, float) and value.is_integer() and abs(value) < 2**53:
        return int(value)
    return value


def as_flag(value: Any) -> Any:
    """``True`` for "true", "True", 1 and "1", likewise ``False``; else ``value`` itself."""
    if isinstance(value, str):
        return _FLAGS.get(value.strip().lower(), value)
    return bool(value) if isinstance(value, int | float) and value in (0, 1) else value


def as_number(value: Any) -> Any:
    """``0.1`` for "0.1"; else ``value`` itself."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
