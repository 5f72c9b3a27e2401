"""``python -m gptq_cli``: the command line where nothing was installed."""

import sys

from . import main

sys.exit(main())
