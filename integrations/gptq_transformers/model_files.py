"""Where a file of a model lies on this machine."""

from __future__ import annotations

from pathlib import Path

from transformers.utils import cached_file


def local_file(model: str | Path, name: str) -> Path | None:
    """The file called ``name`` in a model's folder, or in the hub's cache; None if it is not there. Asks no hub."""
    if Path(model).is_dir():
        found = Path(model) / name
        return found if found.is_file() else None
    try:
        cached = cached_file(str(model), name, local_files_only=True)
    except (OSError, ValueError):
        return None
    return None if cached is None else Path(cached)
