"""``python -m gptq_transformers``: the same as ``python -m gptq_cli``, which starts faster."""

import sys

from gptq_cli import main

sys.exit(main())
