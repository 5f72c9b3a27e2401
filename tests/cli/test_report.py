"""The page of a quantization: its labels fit, and its figures keep their digits."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers")

from gptq_cli.formatting import percent, significant, with_error
from gptq_cli.report import HTML_NAME, JSON_NAME, render_html, write_reports

WIDEST_DIGIT = 0.62  # of the font's size, in the fonts that system-ui stands for


def report(losses: list[float], kld: float = 0.01) -> dict:
    """As ``make_report`` makes it, of layers with these errors."""
    layer = {"bits": 4, "group_size": 128, "method": "cholesky", "damp_percent": 0.15, "tokens": 9, "dropped_tokens": 0}
    layer |= {"seconds": 1.0, "needed_help": False, "steps": []}
    curve = [{"samples": 2**i, "training": kld / 2**i, "held_out": kld} for i in range(4)]
    choice = {"summary": "x", "sources": {}, "left_out": {}, "curve": curve}
    settings = {"bits": 4, "group_size": 128, "sym": True, "desc_act": False, "static_groups": False}
    return {
        "model": "model",
        "settings": settings | {"act_group_aware": True},
        "calibration": {"tokens": 9, "choice": choice},
        "budget": None,
        "modules": len(losses),
        "mean_relative_loss": losses[0],
        "blocks": [],
        "distillation": {"before": kld, "after": kld / 3, "kept": True},
        "evaluation": {"kld": kld, "kld_stderr": kld / 7},
        "seconds": 1.0,
        "bytes_before": 9,
        "bytes_after": 3,
        "versions": {},
        "layers": [
            {**layer, "name": f"model.layers.{i}.mlp.up_proj", "relative_loss": loss} for i, loss in enumerate(losses)
        ],
    }


figures = st.floats(1e-12, 1e3)


@given(st.lists(figures, min_size=1, max_size=40), figures)
def test_no_label_of_a_chart_is_cut(losses: list[float], kld: float) -> None:
    page = render_html(report(losses, kld))
    assert page.count("<svg") == 2
    for width, height, drawn in re.findall(r'<svg viewBox="0 0 (\d+) (\d+)"(.*?)</svg>', page, re.DOTALL):
        size = 10.0
        for x, y, anchor, text in re.findall(r'<text x="([\d.-]+)" y="([\d.-]+)" text-anchor="(\w+)">(.*?)<', drawn):
            length = len(text) * WIDEST_DIGIT * size
            left = float(x) - (length if anchor == "end" else 0)
            assert left >= 0, (text, left)
            assert left + length <= float(width) + 1e-6
            assert size * 0.8 <= float(y) <= float(height)
        for x, y, w, h in re.findall(
            r'<rect[^>]*? x="([\d.]+)" y="([\d.]+)" width="([\d.]+)" height="([\d.]+)"', drawn
        ):
            assert float(x) + float(w) <= float(width)
            assert float(y) + float(h) <= float(height)


@given(st.floats(allow_nan=False, allow_infinity=False).filter(lambda value: value == 0 or abs(value) > 1e-300))
def test_figures_have_three_significant_digits_however_small(value: float) -> None:
    assert math.isclose(float(significant(value)), value, rel_tol=0.005)
    if abs(value) >= 1e-6:
        assert "e" not in significant(value)


@pytest.mark.parametrize(
    ("value", "error", "shown"),
    [
        (0.0123, 0.0045, "0.0123 ± 0.0045"),
        (0.0000123, 0.0000045, "0.0000123 ± 0.0000045"),
        (0.0123, 0.00000045, "0.0123 ± 4.50e-07"),
        (3.4e-9, 1.1e-9, "3.40e-09 ± 1.10e-09"),
        (0.5, None, "0.500"),
        (0.0, 0.0, "0.00 ± 0.00"),
    ],
)
def test_a_figure_and_its_error_are_told_to_the_same_place(value: float, error: float | None, shown: str) -> None:
    assert with_error(value, error) == shown


def test_small_divergences_and_errors_are_not_shown_as_zero() -> None:
    page = render_html(report([3.2e-9, 1.5e-9], 4.56e-6))
    assert "0.00000456 ± 0.00000065" in page
    assert "0.00000456 → 0.00000152" in page
    assert percent(3.2e-9) in page
    assert "0.0000<" not in page
    assert "0.000 %" not in page


def test_a_layer_whose_error_is_not_a_number_is_the_worst(tmp_path: Path) -> None:
    found = report([0.1, math.nan, 0.2])
    worst = re.search(r"Worst modules</h2>.*?<td>(.*?)</td>", render_html(found), re.DOTALL)
    assert worst is not None
    assert worst[1] == "model.layers.1.mlp.up_proj"
    write_reports(found, tmp_path)
    assert json.loads((tmp_path / JSON_NAME).read_text())["layers"][1]["relative_loss"] is None
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([HTML_NAME, JSON_NAME])
