"""Names of modules that do the same job in different blocks."""

from __future__ import annotations


def name_pattern(name: str) -> str:
    """``model.layers.3.mlp.up_proj`` -> ``model.layers.*.mlp.up_proj``."""
    return ".".join("*" if part.isdigit() else part for part in name.split("."))
