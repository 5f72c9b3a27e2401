"""Where the command line was: ``python -m gptq_transformers.cli`` and ``app``, its typer application, still are here.

``python -m gptq_cli`` is the same and starts faster.
"""

import sys

from gptq_cli import main
from gptq_cli.app import app

__all__ = ["app"]

if __name__ == "__main__":
    sys.exit(main())
