"""What is known about one quantization: a JSON file for programs, and an HTML page to look at."""

from __future__ import annotations

import dataclasses
import math
import platform
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers

from gptq_backend import QuantizeReport
from gptq_backend import __version__ as version
from gptq_backend.budget import BudgetPlan
from gptq_backend.locks import write_text

from .formatting import to_json
from .report_page import badness, render_html

JSON_NAME, HTML_NAME = "quantize_report.json", "quantize_report.html"


def make_report(
    report: QuantizeReport,
    model: str,
    output: Path,
    calibration: Mapping[str, Any] | None,
    plan: BudgetPlan | None = None,
) -> dict[str, Any]:
    """Everything known about one quantization of ``model`` into the folder ``output``, as JSON values.

    ``calibration`` says where the calibration tokens came from; None for round to nearest. ``plan`` is how a budget was
    spent, if there was one. ``evaluation`` in the result
    is None; the caller may put the fields of an ``evaluate.Evaluation`` there.
    """
    distilled = report.distillation
    layers = [dataclasses.asdict(layer) for layer in report.layers]
    for layer in layers:
        layer["needed_help"] = calibration is not None and layer["method"] not in ("cholesky", "nearest")
    errors = [layer["relative_loss"] for layer in layers if math.isfinite(layer["relative_loss"])]
    return {
        "model": str(model),
        "output": str(output),
        "settings": report.config.to_dict(),
        "calibration": None if calibration is None else dict(calibration),
        "budget": plan and plan.report(),
        "modules": len(layers),
        "mean_relative_loss": statistics.fmean(errors) if errors else None,
        "worst_module": max(layers, key=badness)["name"] if layers else None,
        "kept": report.kept,
        "unrouted": report.unrouted,
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


def weights_size(path: str | Path) -> int | None:
    """Bytes of a folder's weight files; None for a name on a hub."""
    folder = Path(path)
    if not folder.is_dir():
        return None
    files = [*folder.glob("*.safetensors")] or [*folder.glob("*.bin")]
    return sum(file.stat().st_size for file in files)


def write_reports(report: Mapping[str, Any], folder: Path) -> tuple[Path, Path]:
    """Write both files into ``folder``, each whole or not at all. Returns their paths (JSON, HTML)."""
    write_text(folder / JSON_NAME, to_json(report) + "\n")
    write_text(folder / HTML_NAME, render_html(report))
    return folder / JSON_NAME, folder / HTML_NAME
