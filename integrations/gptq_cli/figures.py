"""Figures as people read them."""

from __future__ import annotations

import math


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
