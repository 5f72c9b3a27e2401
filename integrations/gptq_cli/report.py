"""The report of one quantization: a JSON file for programs, and an HTML page that one can look at."""

from __future__ import annotations

import dataclasses
import json
import math
import platform
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

import torch
import transformers

from gptq_backend import QuantizeReport
from gptq_backend import __version__ as version
from gptq_backend.locks import write_text

JSON_NAME, HTML_NAME = "quantize_report.json", "quantize_report.html"

_CSS = """
:root { --page: #f6f7f9; --card: #fff; --ink: #1c2430; --soft: #66707f; --line: #dfe3e9; --bar: #3b76d6;
  --odd: #d9822b; }
@media (prefers-color-scheme: dark) { :root { --page: #14181f; --card: #1d232d; --ink: #e4e8ee; --soft: #98a2b1;
  --line: #333c49; --bar: #6ea1f0; --odd: #f0a65a; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--ink); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 32px 20px 64px; }
h1 { font-size: 24px; margin: 0; overflow-wrap: anywhere; } h2 { font-size: 17px; margin: 36px 0 4px; }
p { margin: 4px 0 14px; color: var(--soft); max-width: 78ch; }
.grid { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(200px, 1fr)); }
.cards { display: flex; flex-wrap: wrap; } .cards .card { flex: 1 1 auto; white-space: nowrap; }
.panels { grid-template-columns: repeat(auto-fill, minmax(330px, 1fr)); }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 12px 16px; }
.card b { display: block; font-size: 18px; font-weight: 600; } .card span, figcaption span { color: var(--soft); }
.card span { font-size: 13px; } figure { margin: 0; } figcaption { display: flex; justify-content: space-between; }
figcaption span { font-size: 13px; } svg { display: block; width: 100%; height: auto; margin-top: 6px; }
svg text { font: 10px system-ui, sans-serif; fill: var(--soft); } svg line { stroke: var(--line); }
rect { fill: var(--bar); } rect.odd, .key { fill: var(--odd); background: var(--odd); } rect:hover { opacity: .65; }
.key { display: inline-block; width: 10px; height: 10px; border-radius: 2px; margin-right: 6px; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; width: 100%; font-size: 13px; }
th, td { text-align: right; padding: 4px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 500; } th:first-child, td:first-child, td.left { text-align: left; }
tr.odd td { color: var(--odd); } summary { cursor: pointer; margin: 8px 0; } code { font-size: 13px; }
"""
_WIDTH, _HEIGHT, _TOP, _BOTTOM = 360, 128, 12, 18  # of one panel, in SVG units
_CHARACTER, _SPACE = 6.2, 5  # width of a digit of the labels at most; between a label and its line


def make_report(
    report: QuantizeReport,
    model: str,
    output: Path,
    calibration: Mapping[str, Any] | None,
) -> dict[str, Any]:
    """Everything known about one quantization, as JSON values.

    Args:
        report: what the core reports.
        model: folder or name of the original.
        output: the folder that was written.
        calibration: where the calibration tokens came from; None for round-to-nearest.

    Its ``evaluation`` is None; the caller may put the fields of an ``evaluate.Evaluation`` there.
    """
    distilled = report.distillation
    layers = [dataclasses.asdict(layer) for layer in report.layers]
    for layer in layers:
        layer["needed_help"] = calibration is not None and layer["method"] != "cholesky"
    errors = [layer["relative_loss"] for layer in layers if math.isfinite(layer["relative_loss"])]
    return {
        "model": str(model),
        "output": str(output),
        "settings": report.config.to_dict(),
        "calibration": None if calibration is None else dict(calibration),
        "modules": len(layers),
        "mean_relative_loss": statistics.fmean(errors) if errors else None,
        "worst_module": max(layers, key=_badness)["name"] if layers else None,
        "blocks": [dataclasses.asdict(block) for block in report.blocks],
        "distillation": distilled and {key: getattr(distilled, key) for key in ("before", "after", "kept")},
        "evaluation": None,
        "seconds": report.seconds,
        "bytes_before": weights_size(model),
        "bytes_after": weights_size(output),
        "versions": {
            "gptq_backend": version,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        },
        "layers": layers,
    }


def _badness(layer: Mapping[str, Any]) -> float:
    """For sorting; NaN, which compares with nothing, is the worst."""
    return layer["relative_loss"] if math.isfinite(layer["relative_loss"]) else math.inf


def weights_size(path: str | Path) -> int | None:
    """Bytes of a folder's weight files; None for a name on a hub."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    return sum(file.stat().st_size for file in files)


def write_reports(report: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write both files into ``folder``, each whole or not at all. Returns their paths (JSON, HTML)."""
    text = json.dumps(finite(report), indent=2) + "\n"
    for name, content in ((JSON_NAME, text), (HTML_NAME, render_html(report))):
        write_text(folder / name, content)
    return folder / JSON_NAME, folder / HTML_NAME


def finite(value: Any) -> Any:
    """The same value with NaN and infinities, which JSON does not know, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [finite(entry) for entry in value]
    return value


def render_html(report: Mapping[str, Any]) -> str:
    """A page that needs nothing beside itself: no scripts, fonts or pictures from elsewhere."""
    layers = report["layers"]
    energy = "weights'" if report["calibration"] is None else "layer's output"
    weighted = report["calibration"] is not None and report["settings"].get("token_weights")
    note = " Before attention, tokens count by what an error there changes." if weighted else ""
    helped = sum(layer["needed_help"] for layer in layers)
    legend = ""
    if helped:
        found = f"{helped} of {len(layers)} modules could not be factored at once: more damping or another method."
        legend = f'<p><span class="key"></span>{found}</p>'
    panels = "\n".join(_panel(kind, members) for kind, members in by_kind(layers).items())
    name = Path(report["model"]).name or report["model"]
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<title>Quantization of {escape(name)}</title><style>{_CSS}</style></head><body><main>
<h1>{escape(name)}, quantized</h1>
<p>{escape(_describe(report))}</p>
<div class="grid cards">{_cards(report)}</div>
{_choice((report["calibration"] or {}).get("choice"))}
<h2>Error per module</h2>
<p>Share of the {energy} energy that is error, one bar per block. Every panel has a scale of its own; hold the pointer
over a bar for its module.{note} The tables' column "steps" is the error after the column loop, then after each
refinement.</p>{legend}
<div class="grid panels">{panels}</div>
<h2>Worst modules</h2>
{_table(sorted(layers, key=_badness, reverse=True)[:10])}
{_blocks(report["blocks"])}
<details><summary>All {len(layers)} modules, in the order they were done</summary>{_table(layers)}</details>
<details><summary>Settings</summary><pre><code>{escape(json.dumps(finite(report["settings"]), indent=2))}
{escape(json.dumps(finite(report["versions"]), indent=2))}</code></pre></details>
</main></body></html>
"""


def by_kind(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Modules that do the same job in different blocks: ``layers.3.mlp.up_proj`` falls under ``mlp.up_proj``."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        pattern = ".".join("*" if part.isdigit() else part for part in layer["name"].split("."))
        kinds.setdefault(pattern.partition(".*.")[2] or pattern, []).append(layer)
    return kinds


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


def _describe(report: Mapping[str, Any]) -> str:
    settings, calibration = report["settings"], report["calibration"]
    group = "one group per output channel" if settings["group_size"] == -1 else f"groups of {settings['group_size']}"
    words = [f"{settings['bits']} bits", group, "symmetric" if settings["sym"] else "asymmetric"]
    words += [label for key, label in (("desc_act", "act-order"), ("static_groups", "static groups")) if settings[key]]
    if settings["act_group_aware"] and calibration is not None:
        words.append("group-aware order")
    if calibration is None:
        return ", ".join(words) + "; rounded to nearest, without calibration."
    if "choice" in calibration:
        return f"{', '.join(words)}; GPTQ on {calibration['tokens']} tokens, chosen automatically."
    return (
        f"{', '.join(words)}; GPTQ on {calibration['tokens']} tokens of {Path(calibration['file']).name}"
        f" (up to {calibration['samples']} windows of {calibration['seqlen']}, seed {calibration['seed']})."
    )


def _cards(report: Mapping[str, Any]) -> str:
    before, after = report["bytes_before"], report["bytes_after"]
    damping = sorted({layer["damp_percent"] for layer in report["layers"]})
    shown = ", ".join(f"{value:.3g}" for value in damping[:3]) + (" ..." if len(damping) > 3 else "")
    methods = sorted({layer["method"] for layer in report["layers"]})
    cards = [
        (str(report["modules"]), "modules quantized"),
        (percent(report["mean_relative_loss"]), "mean error"),
        (f"{megabytes(before)} → {megabytes(after)}" if before else megabytes(after), "weights on disk"),
        (duration(report["seconds"]), "time"),
        (shown if report["calibration"] else "none", "damping used"),
        (", ".join(methods), "method"),
    ]
    if (found := report["evaluation"]) is not None:
        cards.insert(2, (with_error(found["kld"], found["kld_stderr"]), "KL divergence, nats"))
    if (found := report["distillation"]) is not None:
        label = "held-out KL divergence, distilled" + ("" if found["kept"] else "; undone")
        cards.insert(2, (f"{significant(found['before'])} → {significant(found['after'])}", label))
    return "".join(f'<div class="card"><b>{escape(value)}</b><span>{label}</span></div>' for value, label in cards)


def _choice(choice: Mapping[str, Any] | None) -> str:
    """What ``calibration="auto"`` chose: a sentence, its sources, and the predicted errors by number of windows."""
    if choice is None:
        return ""
    rows = "".join(
        f"<tr><td>{escape(name)}</td><td>{found['chosen']}</td><td>{found['pool']}</td><td>{percent(found['weight'])}"
        f"</td><td></td></tr>"
        for name, found in choice["sources"].items()
    )
    rows += "".join(
        f'<tr class="odd"><td>{escape(name)}</td><td>0</td><td>0</td><td></td><td class="left">{escape(why)}</td></tr>'
        for name, why in choice["left_out"].items()
    )
    heads = "".join(f"<th>{head}</th>" for head in ("source", "windows chosen", "in the pool", "weight", ""))
    return f"""<h2>Calibration text</h2><p>{escape(choice["summary"])}</p>
<div class="grid panels">{_curve(choice["curve"])}</div>
<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"""


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


def _curve(points: Sequence[Mapping[str, Any]]) -> str:
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
    return (
        '<figure class="card"><figcaption>predicted error by windows<span>held out (blue), chosen (grey)</span>'
        f'</figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" '
        f'aria-label="Predicted error by number of windows">{"".join(parts)}</svg></figure>'
    )


def _panel(kind: str, layers: Sequence[Mapping[str, Any]]) -> str:
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
    label = escape(f"Error of {kind} by block")
    return (
        f'<figure class="card"><figcaption><code>{escape(kind)}</code><span>mean {percent(statistics.fmean(errors))}'
        f'</span></figcaption><svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{label}">'
        f"{''.join(parts)}</svg></figure>"
    )


def _blocks(blocks: Sequence[Mapping[str, Any]]) -> str:
    """How the training of blocks went, where there was one."""
    if not blocks:
        return ""
    rows = "".join(
        f"<tr><td>{escape(block['name'])}</td><td>{percent(block['before'])}</td><td>{percent(block['after'])}</td>"
        f'<td class="left">{"" if block["kept"] else "no better, undone"}</td></tr>'
        for block in blocks
    )
    heads = "".join(f"<th>{head}</th>" for head in ("block", "error before", "after", ""))
    return f"""<h2>Training of blocks</h2>
<p>Share of each block's output energy that is error, everything before it included, on windows that were held out.</p>
<div class="scroll"><table><thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div>"""


def _table(layers: Sequence[Mapping[str, Any]]) -> str:
    heads = ("module", "error", "bits", "group", "method", "steps", "damping", "tokens", "dropped", "seconds")
    rows = []
    for layer in layers:
        cells = (
            layer["name"],
            percent(layer["relative_loss"]),
            layer["bits"],
            layer["group_size"],
            layer["method"],
            " → ".join(percent(step["error"]) for step in layer["steps"]),
            f"{layer['damp_percent']:.3g}",
            layer["tokens"],
            layer["dropped_tokens"],
            f"{layer['seconds']:.2f}",
        )
        odd = ' class="odd"' if layer["needed_help"] else ""
        rows.append(f"<tr{odd}>" + "".join(f"<td>{escape(str(cell))}</td>" for cell in cells) + "</tr>")
    head = "".join(f"<th>{name}</th>" for name in heads)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{"".join(rows)}</tbody></table></div>'
