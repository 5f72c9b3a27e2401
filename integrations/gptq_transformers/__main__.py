"""``python -m gptq_transformers``: the command line where nothing was installed."""

from .cli import app

app(prog_name="gptq-backend")
