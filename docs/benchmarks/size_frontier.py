"""How close are models of equal file size: ours beside GGUF files, as a table and a picture (docs/accuracy.md).

    python docs/benchmarks/size_frontier.py measure MODEL TEXT --ours FOLDER... --gguf FILE... --json size-frontier.json
    python docs/benchmarks/size_frontier.py draw size-frontier.json

The first command compares each folder and file with MODEL and adds it to the JSON. transformers reads the GGUF files,
with the package gguf, into float32. The second prints the table and draws the picture beside the JSON.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from gptq_backend.format import checkpoint_files, read_manifest
from gptq_cli.evaluate import cut_windows, evaluate
from gptq_cli.models import load_model

OURS, GGUF = "ours", "GGUF"
COLORS = {OURS: "#2563eb", GGUF: "#d97706"}
WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 640, 340, 52, 12, 30, 40  # of one panel, and its margins
CROWDED = 10  # labels of points that are no further apart would hide each other
MEGABYTE = 1e6


class Remembered(nn.Module):
    """A model that computes the logits of each window once: a reference beside many models."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config = model, model.config
        self.found: dict[tuple[int, ...], Any] = {}

    def forward(self, input_ids: torch.Tensor, **options: Any) -> Any:
        key = tuple(input_ids.flatten().tolist())
        if key not in self.found:
            self.found[key] = self.model(input_ids=input_ids, **options)
        return self.found[key]


def measure(options: argparse.Namespace) -> None:
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    windows = cut_windows(options.text.read_text(encoding="utf-8"), tokenizer, options.seqlen, options.windows)
    reference = Remembered(load_model(options.model))
    for describe, read, paths in ((our_file, load_model, options.ours), (gguf_file, read_gguf, options.gguf)):
        for path in paths:
            found = evaluate(read(path), windows, reference)
            point = {
                "model": options.model.name,
                **describe(path),
                "kld": found.kld,
                "kld_stderr": found.kld_stderr,
                "top1_agreement": found.top1_agreement,
                "perplexity": found.perplexity,
                "reference_perplexity": found.reference_perplexity,
                "windows": found.windows,
                "seqlen": found.seqlen,
                "how": options.how,
            }
            add(options.json, point)
            print(f"{point['name']}: {point['bytes'] / MEGABYTE:.1f} MB, {found.kld:.4f} ± {found.kld_stderr:.4f}")


def our_file(folder: Path) -> dict[str, Any]:
    """What is stored in a checkpoint of ours."""
    settings = json.loads((folder / "config.json").read_text())["quantization_config"]
    files = checkpoint_files(folder)
    rules = settings.get("dynamic") or {}
    embedding: dict[str, Any] = next(
        (rule for pattern, rule in rules.items() if "embed" in pattern or "wte" in pattern), {}
    )
    return {
        "kind": OURS,
        "name": folder.name,
        "bits": settings["bits"],
        "group_size": settings["group_size"],
        "embed_bits": embedding.get("bits", 16),
        "embed_group_size": embedding.get("group_size"),
        "dynamic": rules,
        "bytes": sum(path.stat().st_size for path in files),
        "tensor_bytes": sum(tensor.nbytes for tensor in read_manifest(files).values()),
    }


def gguf_file(path: Path) -> dict[str, Any]:
    """What is stored in a GGUF file, whose name ends in its kind: MODEL-Q4_K_M.gguf."""
    import gguf

    tensors = gguf.GGUFReader(path).tensors
    embedding = next(tensor for tensor in tensors if tensor.name == "token_embd.weight")
    return {
        "kind": GGUF,
        "name": path.stem.rpartition("-")[2],
        "embedding": embedding.tensor_type.name,
        "types": sorted({tensor.tensor_type.name for tensor in tensors if tensor.tensor_type.name != "F32"}),
        "bytes": path.stat().st_size,
        "tensor_bytes": sum(int(tensor.n_bytes) for tensor in tensors),
    }


def read_gguf(path: Path) -> nn.Module:
    """The model in a GGUF file, dequantized to float32."""
    model: nn.Module = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32)
    return model.eval()


def add(file: Path, point: dict[str, Any]) -> None:
    """Write ``point`` into the JSON, in the place of an earlier one of the same name."""
    points = json.loads(file.read_text()) if file.exists() else []
    points = [each for each in points if any(each[key] != point[key] for key in ("model", "kind", "name"))] + [point]
    points.sort(key=lambda each: (each["model"], each["tensor_bytes"]))
    file.write_text(json.dumps(points, indent=1) + "\n")


def frontier(points: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Those of a kind that no smaller one of it beats, by size."""
    best: list[dict[str, Any]] = []
    for point in sorted(points, key=lambda each: each["tensor_bytes"]):
        if point["kind"] == kind and (not best or point["kld"] < best[-1]["kld"]):
            best.append(point)
    return best


def rival(point: dict[str, Any], points: list[dict[str, Any]]) -> dict[str, Any] | None:
    """The closest model of the other kind that is no larger than ``point``."""
    others = [
        each
        for each in points
        if each["model"] == point["model"]
        and each["kind"] != point["kind"]
        and each["tensor_bytes"] <= point["tensor_bytes"]
    ]
    return min(others, key=lambda each: each["kld"], default=None)


def ratio(point: dict[str, Any], other: dict[str, Any]) -> str:
    """Divergence of ours over that of GGUF, of which ``point`` and ``other`` are one each."""
    found = point["kld"] / other["kld"]
    return f"{found if point['kind'] == OURS else 1 / found:.2f}"


def label(point: dict[str, Any]) -> str:
    if point["kind"] == GGUF:
        return str(point["name"])
    if point["how"].startswith("budget"):  # layers differ
        return f"{point['how']}, e{point['embed_bits']} g{point['embed_group_size']}"
    group, size = point["embed_group_size"] or point["group_size"], point["group_size"]
    own = "" if group == size else " by row" if group == -1 or group > size > 0 else f" g{group}"
    return f"{point['bits']} bits, g{size}, e{point['embed_bits']}{own}"


def table(points: list[dict[str, Any]]) -> Iterator[str]:
    yield "| model | weights | how | tensors, MB | file, MB | KL divergence | top-1 | best other, no larger | ratio |"
    yield "|---|---|---|---|---|---|---|---|---|"
    for point in points:
        other = rival(point, points)
        cells = (
            point["model"],
            f"GGUF {label(point)}" if point["kind"] == GGUF else f"ours, {label(point)}",
            point["how"],
            f"{point['tensor_bytes'] / MEGABYTE:.1f}",
            f"{point['bytes'] / MEGABYTE:.1f}",
            f"{point['kld']:.4f} ± {point['kld_stderr']:.4f}",
            f"{point['top1_agreement']:.1%}",
            label(other) if other else "",
            ratio(point, other) if other else "",
        )
        yield "| " + " | ".join(cells) + " |"


def panel(points: list[dict[str, Any]], above: float) -> Iterator[str]:
    """SVG of one model's points, ``above`` units from the top: divergence on a logarithmic scale over size."""
    largest = max(each["tensor_bytes"] for kind in COLORS for each in frontier(points, kind))
    points = [each for each in points if each["tensor_bytes"] <= largest]  # one far away is in the table
    sizes, klds = ([each[key] for each in points] for key in ("tensor_bytes", "kld"))
    low, high = math.floor(min(sizes) / 1e7 - 1) * 1e7, math.ceil(largest / 1e7) * 1e7
    least, most = math.log10(min(klds)) - 0.1, math.log10(max(klds)) + 0.1

    def at(size: float, kld: float) -> tuple[float, float]:
        across, down = (size - low) / (high - low), (most - math.log10(kld)) / (most - least)
        return LEFT + (WIDTH - LEFT - RIGHT) * across, above + TOP + (HEIGHT - TOP - BOTTOM) * down

    base = above + HEIGHT - BOTTOM
    yield f'<text x="{LEFT}" y="{above + 18}" font-weight="bold">{points[0]["model"]}</text>'
    for exponent in range(math.floor(least), math.ceil(most) + 1):
        for kld in (10.0**exponent, 3 * 10.0**exponent):
            if least <= math.log10(kld) <= most:
                y = at(low, kld)[1]
                yield f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="#e5e7eb"/>'
                yield f'<text x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{kld:g}</text>'
    step = next(size * MEGABYTE for size in (5, 10, 20, 50, 100, 200, 500) if high - low <= 10 * size * MEGABYTE)
    for index in range(math.ceil(low / step), math.floor(high / step) + 1):
        x = at(index * step, 1)[0]
        yield f'<text x="{x:.1f}" y="{base + 16}" text-anchor="middle">{index * step / MEGABYTE:g}</text>'
    yield f'<text x="{WIDTH - RIGHT}" y="{base + 32}" text-anchor="end">MB of tensors; KL divergence upwards</text>'
    for kind, color in COLORS.items():
        mine = [each for each in points if each["kind"] == kind]
        best = frontier(points, kind)
        line = " ".join("{:.1f},{:.1f}".format(*at(each["tensor_bytes"], each["kld"])) for each in best)
        yield f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>'
        labelled = 0.0
        for each in mine:
            x, y = at(each["tensor_bytes"], each["kld"])
            tip = f"{label(each)}: {each['tensor_bytes'] / MEGABYTE:.1f} MB, {each['kld']:.4f}"
            fill = color if each in best else "white"
            dot = f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{fill}" stroke="{color}">'
            yield f"{dot}<title>{tip}</title></circle>"
            if each in best and x - labelled > CROWDED:  # ours below their line, GGUF's above it
                labelled = x
                place = 'text-anchor="end" dx="-5" dy="11"' if kind == OURS else 'dx="5" dy="-5"'
                yield f'<text x="{x:.1f}" y="{y:.1f}" {place} font-size="9" fill="{color}">{label(each)}</text>'


def draw(options: argparse.Namespace) -> None:
    points = json.loads(options.json.read_text())
    print("\n".join(table(points)))
    models = sorted({each["model"] for each in points})
    parts = [f'<rect width="{WIDTH}" height="{HEIGHT * len(models)}" fill="white"/>']
    for index, model in enumerate(models):
        parts += panel([each for each in points if each["model"] == model], index * HEIGHT)
    for index, (kind, color) in enumerate(COLORS.items()):
        parts.append(f'<text x="{WIDTH - 90 + 50 * index}" y="18" fill="{color}" font-weight="bold">{kind}</text>')
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT * len(models)}"'
    style = 'font-family="sans-serif" font-size="11"'
    options.json.with_suffix(".svg").write_text(f"{opening} {style}>{''.join(parts)}</svg>\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    measuring = commands.add_parser("measure")
    measuring.add_argument("model", type=Path, help="the original in 16 bits")
    measuring.add_argument("text", type=Path)
    measuring.add_argument("--ours", type=Path, nargs="*", default=[])
    measuring.add_argument("--gguf", type=Path, nargs="*", default=[])
    measuring.add_argument("--windows", type=int, default=12)
    measuring.add_argument("--seqlen", type=int, default=512)
    measuring.add_argument("--how", default="", help="what is special about how the folders were made")
    measuring.add_argument("--json", type=Path, required=True)
    measuring.set_defaults(command=measure)
    drawing = commands.add_parser("draw")
    drawing.add_argument("json", type=Path)
    drawing.set_defaults(command=draw)
    options = parser.parse_args()
    options.command(options)


if __name__ == "__main__":
    main()
