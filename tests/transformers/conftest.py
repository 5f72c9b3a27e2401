"""Fixtures of the commands' tests that these use, too."""

from tests.cli.conftest import offline, original

__all__ = ["offline", "original"]
