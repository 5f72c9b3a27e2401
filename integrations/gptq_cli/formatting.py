"""Values as text: figures for people, JSON for programs."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any


def percent(share: float | None) -> str:
    """Three significant digits."""
    return "n/a" if share is None or not math.isfinite(share) else f"{significant(100 * share)} %"


def significant(value: float | None) -> str:
    """Three significant digits, without an exponent down to a millionth."""
    if value is None or not math.isfinite(value):
        return "n/a"
    if value == 0 or abs(value) < 1e-6:
        return f"{value:.2e}" if value else "0.00"
    return f"{value:.{max(0, 2 - math.floor(math.log10(abs(value))))}f}"


def with_error(value: float, error: float | None) -> str:
    """A figure and its standard error, to the same place: 0.00123 ± 0.00005."""
    shown = significant(value)
    if error is None or not math.isfinite(error):
        return shown
    places = len(shown.partition(".")[2]) if "e" not in shown else 0
    return f"{shown} ± {error:.{places}f}" if float(f"{error:.{places}f}") else f"{shown} ± {significant(error)}"


def megabytes(size: int | None) -> str:
    """Bytes for people."""
    return "n/a" if size is None else f"{size / 1e9:.2f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


def duration(seconds: float) -> str:
    """Seconds for people."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{hours} h {minutes:02d} min" if hours else f"{minutes} min {rest:02d} s"


def name_pattern(name: str) -> str:
    """``model.layers.3.mlp.up_proj`` -> ``model.layers.*.mlp.up_proj``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def to_json(value: Any, indent: int | None = 2) -> str:
    """JSON, in one line where ``indent`` is None; NaN and infinities, which it does not know, are null."""
    return json.dumps(_finite(value), indent=indent)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return value
