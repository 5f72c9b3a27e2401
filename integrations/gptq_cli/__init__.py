"""The program ``gptq-backend``. This module and ``app`` import neither torch nor transformers: help comes at once."""

from __future__ import annotations

import io
import sys
from importlib.util import find_spec

_NEEDED = ("typer", "rich", "transformers", "accelerate", "psutil")
INTERRUPTED = 130  # what shells report for a program that Ctrl-C ended


def main() -> int:
    """Run the command line; where the packages that it needs are missing, say how to install them."""
    if missing := [name for name in _NEEDED if find_spec(name) is None]:
        print(
            f"error: gptq-backend needs {', '.join(missing)}, not installed here; "
            'install the command line with: pip install "gptq-backend[transformers]"',
            file=sys.stderr,
        )
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):  # an encoding without some sign is no reason to lose a result
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        from .app import app
    except KeyboardInterrupt:
        return INTERRUPTED
    app(prog_name="gptq-backend")
    return 0
