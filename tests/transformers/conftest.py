"""Fixtures of the commands' tests that these use, too."""

from tests.cli.conftest import original

__all__ = ["original"]
