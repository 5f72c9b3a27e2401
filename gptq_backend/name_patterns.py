r"""Regular expressions that come with a checkpoint, matched in bounded time.

A pattern like ``(\w+\.?)+x`` makes Python's own engine try every way to split a name, which takes longer than anyone
waits. The ``regex`` package understands the same patterns and stops at a deadline.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Sequence

import regex

from .errors import ConfigError

_MAX_LENGTH = 10_000  # characters; compiling takes time and stack in proportion
# What all matches of a set of patterns may take: far above what honest ones need (two microseconds each).
_SECONDS = 0.5
_SECONDS_PER_MATCH = 10e-6


class Patterns:
    """An ordered set of patterns; what one name matches is found once.

    Args:
        patterns: as ``re.match`` takes them.

    Raises:
        ConfigError: one is no regular expression, or too long.
    """

    def __init__(self, patterns: tuple[str, ...]) -> None:
        self._patterns = [_compile(pattern) for pattern in patterns]
        self._first: dict[str, int | None] = {}
        self._spent, self._matches = 0.0, 0

    def first(self, name: str) -> int | None:
        """The number of the first pattern that matches the beginning of ``name``.

        Raises:
            ConfigError: that takes too long.
        """
        if name not in self._first:
            self._first[name] = next((i for i, each in enumerate(self._patterns) if self._match(each, name)), None)
        return self._first[name]

    def unused(self, names: Sequence[str]) -> list[int]:
        """The numbers of the patterns that match none of ``names``."""
        return [i for i, each in enumerate(self._patterns) if not any(self._match(each, name) for name in names)]

    def _match(self, pattern: regex.Pattern[str], name: str) -> bool:
        self._matches += 1
        left = _SECONDS + _SECONDS_PER_MATCH * self._matches - self._spent
        start = time.perf_counter()
        try:
            if left <= 0:
                raise TimeoutError
            return pattern.match(name, timeout=left) is not None
        except (TimeoutError, MemoryError):
            raise ConfigError(
                f"dynamic: matching names against {_shown(pattern.pattern)} takes too long; write it without repeated "
                "groups like (a+)+, or name the layers one by one"
            ) from None
        finally:
            self._spent += time.perf_counter() - start


@functools.lru_cache(maxsize=64)
def compiled(patterns: tuple[str, ...]) -> Patterns:
    """The same :class:`Patterns` for the same patterns, so that what was matched once is remembered."""
    return Patterns(patterns)


def _compile(pattern: str) -> regex.Pattern[str]:
    if len(pattern) > _MAX_LENGTH:
        raise ConfigError(
            f"dynamic: {_shown(pattern)} has {len(pattern)} characters, expected at most {_MAX_LENGTH}; split the rule"
        )
    try:
        return regex.compile(pattern)
    except (regex.error, ValueError, OverflowError, RecursionError, MemoryError) as error:
        reason = "too deeply nested" if isinstance(error, RecursionError) else str(error)
        raise ConfigError(
            f"dynamic: {_shown(pattern)} is not a regular expression ({reason}); correct it or remove the rule"
        ) from None


def _shown(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else f"{pattern[:57]}...")
