"""The charts of the report's page, as SVG."""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from .formatting import megabytes, percent, significant

_WIDTH, _HEIGHT, _TOP, _BOTTOM = 360, 128, 12, 18  # of one panel, in SVG units
_CHARACTER, _SPACE = 6.2, 5  # width of a digit of the labels at most; between a label and its line


def predicted_errors(points: Sequence[Mapping[str, Any]]) -> str:
    """One SVG chart of two lines over the number of windows, doublings evenly spaced."""
    base, reach = _HEIGHT - _BOTTOM, math.log2(max(points[-1]["samples"], 2))
    shown = [value for point in points for value in (point["training"], point["held_out"]) if math.isfinite(value)]
    top = max(shown)
    left, axis = _axis(top, significant)
    parts = [axis]
    for key, color in (("training", "--soft"), ("held_out", "--bar")):
        at = [
            (left + (_WIDTH - left) * math.log2(point["samples"]) / reach, base - (base - _TOP) * point[key] / top)
            for point in points
            if math.isfinite(point[key])
        ]
        line = " ".join(f"{x:.1f},{y:.1f}" for x, y in at)
        parts.append(f'<polyline points="{line}" style="fill:none;stroke:var({color});stroke-width:2"/>')
    for number, x, anchor in ((1, left, "start"), (points[-1]["samples"], _WIDTH, "end")):
        parts.append(f'<text x="{x}" y="{_HEIGHT - 5}" text-anchor="{anchor}">{number}</text>')
    return _figure(
        "predicted error by windows", "held out (blue), chosen (grey)", "Predicted error by number of windows", parts
    )


def error_bars(kind: str, layers: Sequence[Mapping[str, Any]]) -> str:
    """One SVG bar chart: errors of one kind of module along the depth of the model."""
    errors = [layer["relative_loss"] if math.isfinite(layer["relative_loss"]) else 0.0 for layer in layers]
    top = max(errors) or 1.0
    plot, base = _HEIGHT - _TOP - _BOTTOM, _HEIGHT - _BOTTOM
    left, axis = _axis(top, percent)
    step = (_WIDTH - left) / max(len(layers), 8)
    gap = 0.2 * step if step > 4 else 0.0
    parts = [axis]
    for i, (layer, error) in enumerate(zip(layers, errors, strict=True)):
        height = max(plot * error / top, 0.8)
        tip = f"{layer['name']}: {percent(layer['relative_loss'])}, {layer['bits']} bits, {layer['method']}"
        tip += f", damping {layer['damp_percent']:.3g}, {layer['tokens']} tokens, {layer['seconds']:.2f} s"
        odd = ' class="odd"' if layer["needed_help"] else ""
        parts.append(
            f'<rect{odd} x="{left + i * step + gap / 2:.2f}" y="{base - height:.2f}" width="{step - gap:.2f}" '
            f'height="{height:.2f}" rx="{min(1.5, step / 4):.2f}"><title>{escape(tip)}</title></rect>'
        )
    for i, anchor in {0: "start", len(layers) - 1: "end"}.items():
        number = re.search(r"\.(\d+)\.", layers[i]["name"])
        if number:
            x = left + (i + (anchor == "end")) * step
            parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 5}" text-anchor="{anchor}">{number[1]}</text>')
    mean = f"mean {percent(statistics.fmean(errors))}"
    return _figure(f"<code>{escape(kind)}</code>", mean, escape(f"Error of {kind} by block"), parts)


def budget_curve(plan: Mapping[str, Any]) -> str:
    """One SVG chart: the predicted divergence that each size of file would have, and the size that was chosen."""
    points = [(size, value) for size, value in plan["curve"] if value > 0]
    sizes = [size for size, _ in points]
    low, high = math.log10(min(value for _, value in points)), math.log10(max(value for _, value in points))
    base = _HEIGHT - _BOTTOM
    parts = []
    labels = {share: significant(10 ** (low + share * (high - low))) for share in (0.0, 0.5, 1.0)}
    left = max(map(len, labels.values())) * _CHARACTER + _SPACE

    def at(size: float, value: float) -> tuple[float, float]:
        share = (math.log10(value) - low) / ((high - low) or 1.0)
        x = left + (_WIDTH - left - _SPACE) * (size - sizes[0]) / ((sizes[-1] - sizes[0]) or 1)
        return x, base - (base - _TOP) * share

    for share, label in labels.items():
        y = base - (base - _TOP) * share
        parts.append(f'<line x1="{left:.1f}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - _SPACE:.1f}" y="{y + 3:.1f}" text-anchor="end">{label}</text>')
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in points))
    parts.append(f'<polyline points="{line}" style="fill:none;stroke:var(--bar);stroke-width:2"/>')
    if plan["divergence"] > 0:
        x, y = at(plan["nbytes"], plan["divergence"])
        parts.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="4" style="fill:var(--odd)"/>')
    for size, x, anchor in ((sizes[0], left, "start"), (sizes[-1], _WIDTH, "end")):
        parts.append(f'<text x="{x:.1f}" y="{_HEIGHT - 5}" text-anchor="{anchor}">{megabytes(size)}</text>')
    return _figure("predicted divergence by size", "logarithmic", "Predicted divergence by size of the files", parts)


def budget_bits(kind: str, groups: Sequence[Mapping[str, Any]]) -> str:
    """One SVG bar chart: bits that a budget gave to layers of one kind along the depth of the model."""
    base, top = _HEIGHT - _BOTTOM, max(each["bits"] for each in groups)
    left, axis = _axis(top, lambda value: f"{value:g}")
    step = (_WIDTH - left) / max(len(groups), 8)
    parts = [axis]
    for i, each in enumerate(groups):
        height = (base - _TOP) * each["bits"] / top
        tip = f"{', '.join(each['layers'])}: {each['bits']} bits, groups of {each['group_size']}, "
        tip += f"predicted divergence {significant(each['divergence'])}"
        parts.append(
            f'<rect x="{left + i * step + 0.1 * step:.2f}" y="{base - height:.2f}" width="{0.8 * step:.2f}" '
            f'height="{height:.2f}"><title>{escape(tip)}</title></rect>'
        )
    count = len(groups[0]["layers"])
    note = f"bits by block, of {count} layers" if count > 1 else "bits by block"
    return _figure(f"<code>{escape(kind)}</code>", note, escape(f"Bits of {kind} by block"), parts)


def _figure(caption: str, note: str, label: str, parts: Sequence[str]) -> str:
    """One chart with what is written above it; all arguments are HTML or SVG."""
    return (
        f'<figure class="card"><figcaption>{caption}<span>{note}</span></figcaption>'
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">{"".join(parts)}</svg></figure>'
    )


def _axis(top: float, show: Callable[[float], str]) -> tuple[float, str]:
    """Three lines from zero to ``top`` with their labels -> where the plot begins (so that none is cut), and SVG."""
    labels = {share: show(share * top) for share in (0.0, 0.5, 1.0)}
    left = max(map(len, labels.values())) * _CHARACTER + _SPACE
    parts = []
    for share, label in labels.items():
        y = _HEIGHT - _BOTTOM - share * (_HEIGHT - _BOTTOM - _TOP)
        parts.append(f'<line x1="{left:.1f}" x2="{_WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{left - _SPACE:.1f}" y="{y + 3:.1f}" text-anchor="end">{label}</text>')
    return left, "".join(parts)
