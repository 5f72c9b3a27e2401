"""What tests of the commands share: a command as a user types it, and its files."""

from __future__ import annotations

from pathlib import Path

from typer.testing import CliRunner, Result

from gptq_cli.app import app

DATA = Path(__file__).parents[1] / "data"
TEXT = DATA / "wikitext2-valid-excerpt.txt"
CHECKPOINTS = DATA / "checkpoints"
SMALL = ["--group-size", "32", "--samples", "4", "--seqlen", "32"]


def run(*arguments: object) -> Result:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


def error(result: Result, code: int = 1) -> str:
    """The one line on stderr of a command that failed because of its user."""
    assert result.exit_code == code, result.output
    assert isinstance(result.exception, SystemExit), result.exception
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    assert lines[0].startswith("error: ")
    assert result.stdout == ""
    return lines[0]
