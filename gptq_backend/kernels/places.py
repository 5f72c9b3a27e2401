"""Do many entries of dictionaries hold what they held?  Looked up in C++ (csrc/cpu/places_module.cpp)."""

from __future__ import annotations

from typing import Any

from .cpu import _cpu


def unchanged(dicts: tuple[dict[str, Any], ...], keys: tuple[str, ...], values: tuple[Any, ...]) -> bool:
    """``all(d.get(key) is value for ...)``."""
    return _cpu.unchanged(dicts, keys, values)


def empty(dicts: tuple[dict[str, Any], ...], keys: tuple[str, ...]) -> bool:
    """``not any(d.get(key) for ...)``."""
    return _cpu.empty(dicts, keys)


def untouched(watches: list[tuple[tuple[Any, ...], ...]]) -> bool:
    """``unchanged(*each[:3]) and empty(*each[3:5])`` for all of them."""
    return _cpu.untouched(watches)


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """Whether they have the same keys and hold the very same objects."""
    return _cpu.same(a, b)
