"""Settings are written once: the command's options and the table in the docs say what their fields say."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

pytest.importorskip("typer")

from gptq_backend.config_fields import QUALITIES, Settings
from gptq_cli.options import by_quality, names_in_core, with_settings
from tests.cli.command import run

OPTIONS = {
    item.name: item.metadata["setting"]
    for item in dataclasses.fields(Settings)
    if item.metadata["setting"].option is not None
}


def test_the_table_in_the_docs_says_what_the_settings_say() -> None:
    page = (Path(__file__).parents[2] / "docs" / "cli.md").read_text(encoding="utf-8")
    lines = page.partition("\n## quantize\n")[2].partition("\n## ")[0].splitlines()
    rows = [[cell.strip().replace("`", "") for cell in line.split("|")[1:-1]] for line in lines if "| `--" in line]
    found = {cells[0].split()[0]: cells for cells in rows if len(cells) == 3}
    names = [(setting.option or f"--{name.replace('_', '-')}").split("/")[0] for name, setting in OPTIONS.items()]
    assert [option for option in found if option in names] == names, "another order, or a setting without a row"
    for option, (name, setting) in zip(names, OPTIONS.items(), strict=True):
        _, default, meaning = found[option]
        assert meaning.startswith(setting.help), option
        if by_quality(name, QUALITIES):
            assert default == by_quality(name, QUALITIES), option


def test_a_command_gets_an_option_for_each_setting() -> None:
    seen: list[dict[str, object]] = []

    @with_settings
    def command(settings: dict[str, object], other: int = 1) -> None:
        seen.append(settings)

    defaults = {name: getattr(Settings(), name) for name in OPTIONS}
    command(**defaults)
    assert seen == [defaults]


def test_the_settings_that_are_read_without_the_package_are_the_same() -> None:
    alone = names_in_core("config_fields.py")["Settings"]
    assert [item.name for item in dataclasses.fields(alone)] == [item.name for item in dataclasses.fields(Settings)]


def test_a_number_below_the_least_is_wrong_usage() -> None:
    result = run("quantize", "model", "out", "--rtn", "--keep-edge-blocks", -1)
    assert result.exit_code == 2
    assert isinstance(result.exception, SystemExit)
    assert "--keep-edge-blocks" in result.stderr
    assert "greater than or" in result.stderr
