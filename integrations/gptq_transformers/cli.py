"""``python -m gptq_transformers.cli``: the same as ``python -m gptq_cli``, which starts faster."""

import sys

from gptq_cli import main

if __name__ == "__main__":
    sys.exit(main())
