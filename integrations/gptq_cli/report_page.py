"""The report of one quantization as an HTML page, from ``report.html``."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from .charts import budget_bits, budget_curve, error_bars, predicted_errors
from .formatting import duration, megabytes, name_pattern, percent, significant, to_json, with_error

_PLACES = 6  # that are shown of those that stay in 16 bits


def render_html(report: Mapping[str, Any]) -> str:
    """A page that needs nothing beside itself: no scripts, fonts or pictures from elsewhere."""
    layers, calibration = report["layers"], report["calibration"]
    weighted = calibration is not None and report["settings"].get("token_weights")
    name = Path(report["model"]).name or report["model"]
    template = (resources.files(__package__) / "report.html").read_text(encoding="utf-8")
    return Template(template).substitute(
        name=escape(name),
        summary=escape(describe(report)),
        cards=_cards(report),
        choice=_budget(report) + _choice((calibration or {}).get("choice")),
        energy="weights'" if calibration is None else "layer's output",
        note=" Before attention, tokens count by what an error there changes." if weighted else "",
        legend=_legend(layers),
        panels="\n".join(error_bars(kind, members) for kind, members in by_kind(layers).items()),
        worst=_modules(sorted(layers, key=badness, reverse=True)[:10]),
        blocks=_blocks(report["blocks"]),
        count=len(layers),
        modules=_modules(layers),
        settings=escape(to_json(report["settings"])),
        versions=escape(to_json(report["versions"])),
    )


def _legend(layers: Sequence[Mapping[str, Any]]) -> str:
    helped = sum(layer["needed_help"] for layer in layers)
    if not helped:
        return ""
    found = f"{helped} of {len(layers)} modules could not be factored at once: more damping or another method."
    return f'<p><span class="key"></span>{found}</p>'


def by_kind(layers: Sequence[Mapping[str, Any]]) -> dict[str, list[Mapping[str, Any]]]:
    """Modules that do the same job in different blocks: ``layers.3.mlp.up_proj`` falls under ``mlp.up_proj``."""
    kinds: dict[str, list[Mapping[str, Any]]] = {}
    for layer in layers:
        pattern = name_pattern(layer["name"])
        kinds.setdefault(pattern.partition(".*.")[2] or pattern, []).append(layer)
    return kinds


def places(kept: Mapping[str, int]) -> str:
    """The largest places that stay in 16 bits, and how many weights they have."""
    shown = [f"{name} ({count / 1e6:.3g} M weights)" for name, count in list(kept.items())[:_PLACES]]
    rest = sum(list(kept.values())[_PLACES:])
    return ", ".join(shown + ([f"others ({rest / 1e6:.3g} M)"] if rest else []))


def badness(layer: Mapping[str, Any]) -> float:
    """For sorting; NaN, which compares with nothing, is the worst."""
    return layer["relative_loss"] if math.isfinite(layer["relative_loss"]) else math.inf


def describe(report: Mapping[str, Any]) -> str:
    """The settings and the calibration in a line."""
    settings, calibration = report["settings"], report["calibration"]
    group = "one group per output channel" if settings["group_size"] == -1 else f"groups of {settings['group_size']}"
    words = [f"{settings['bits']} bits", group]
    if (budget := report["budget"]) is not None:
        words = [f"{budget['layer_bits']:.2f} bits per weight of a layer, chosen by a budget of {budget['goal']}"]
    words.append("symmetric" if settings["sym"] else "asymmetric")
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
    rows: list[tuple[bool, list[object]]] = [
        (False, [name, found["chosen"], found["pool"], percent(found["weight"]), ""])
        for name, found in choice["sources"].items()
    ]
    rows += [(True, [name, 0, 0, "", why]) for name, why in choice["left_out"].items()]
    return f"""<h2>Calibration text</h2><p>{escape(choice["summary"])}</p>
<div class="grid panels">{predicted_errors(choice["curve"])}</div>
{_table(("source", "windows chosen", "in the pool", "weight", ""), rows)}"""


def _budget(report: Mapping[str, Any]) -> str:
    """How a budget was spent: predicted and measured divergence, and the bits of each layer."""
    if (plan := report["budget"]) is None:
        return ""
    found = report["evaluation"]
    measured = "not measured" if found is None else with_error(found["kld"], found["kld_stderr"])
    sizes = Counter((each["bits"], each["group_size"]) for each in plan["groups"] for _ in each["layers"])
    bars = "".join(budget_bits(kind, each) for kind, each in _by_place(plan).items())
    rows = [(False, [f"{bits} bits, groups of {size}", count]) for (bits, size), count in sorted(sizes.items())]
    return f"""<h2>Budget</h2>
<p>{escape(plan["goal"])}: {plan["layer_bits"]:.2f} bits per weight of a layer, {megabytes(plan["nbytes"])} of weight
files, the embedding in {plan["embed_bits"]} bits. Predicted KL divergence {significant(plan["divergence"])}, measured
{measured}. The prediction adds up what each layer's rounding costs by itself.</p>
<div class="grid panels">{budget_curve(plan)}{bars}</div>
{_table(("stored as", "layers"), rows)}"""


def _by_place(plan: Mapping[str, Any]) -> dict[str, list[Mapping[str, Any]]]:
    """Groups of layers that do the same job in different blocks."""
    return by_kind([{**each, "name": each["layers"][0]} for each in plan["groups"]])


def _blocks(blocks: Sequence[Mapping[str, Any]]) -> str:
    """How the training of blocks went, where there was one."""
    if not blocks:
        return ""
    rows = [
        (False, [block["name"], percent(block["before"]), percent(block["after"]), remark])
        for block in blocks
        for remark in ["" if block["kept"] else "no better, undone"]
    ]
    return f"""<h2>Training of blocks</h2>
<p>Share of each block's output energy that is error, everything before it included, on windows that were held out.</p>
{_table(("block", "error before", "after", ""), rows)}"""


def _modules(layers: Sequence[Mapping[str, Any]]) -> str:
    columns: dict[str, Callable[[Mapping[str, Any]], object]] = {
        "module": lambda layer: layer["name"],
        "error": lambda layer: percent(layer["relative_loss"]),
        "bits": lambda layer: layer["bits"],
        "group": lambda layer: layer["group_size"],
        "method": lambda layer: layer["method"],
        "steps": lambda layer: " → ".join(percent(step["error"]) for step in layer["steps"]),
        "damping": lambda layer: f"{layer['damp_percent']:.3g}",
        "tokens": lambda layer: layer["tokens"],
        "dropped": lambda layer: layer["dropped_tokens"],
        "seconds": lambda layer: f"{layer['seconds']:.2f}",
    }
    rows = ((layer["needed_help"], [show(layer) for show in columns.values()]) for layer in layers)
    return _table(list(columns), rows)


def _table(heads: Sequence[str], rows: Iterable[tuple[bool, Sequence[object]]]) -> str:
    """An HTML table of plain text.

    Args:
        heads: titles of the columns; one without a title holds remarks, which are aligned to the left.
        rows: whether it stands out, and its cells.
    """
    head = "".join(f"<th>{title}</th>" for title in heads)
    opening = ["<td>" if title else '<td class="left">' for title in heads]
    body = ""
    for odd, cells in rows:
        inner = "".join(f"{start}{escape(str(cell))}</td>" for start, cell in zip(opening, cells, strict=True))
        body += f'<tr class="odd">{inner}</tr>' if odd else f"<tr>{inner}</tr>"
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'
