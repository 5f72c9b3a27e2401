"""Errors of other libraries by cause: a model that cannot be loaded, or memory that ran out; others are bugs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from gptq_backend import GPTQError
from gptq_backend.errors import is_out_of_memory


def first_line(error: BaseException) -> str:
    """The first line of its message, or the name of its type; a shorter one if it asks to run the model's code."""
    if "trust_remote_code" in str(error) and not isinstance(error, GPTQError):
        return (
            "it comes with Python code of its own, which is not run unasked; read it, and if you trust it pass "
            "--trust-remote-code (trust_remote_code=True in Python)"
        )
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0] if lines else type(error).__name__


# Of transformers, for a model that it cannot load; others are more likely bugs.
_KINDS = (ValueError, KeyError, RuntimeError, SafetensorError, AttributeError, OSError)


@contextmanager
def load_errors(path: str | Path, kinds: tuple[type[Exception], ...] = _KINDS) -> Iterator[None]:
    """Errors of these ``kinds`` become one sentence about the model in ``path``, which cannot be loaded.

    Call only other libraries inside: a bug of this package would look like a damaged model.

    Raises:
        GPTQError: it cannot be loaded.
    """
    try:
        yield
    except kinds as error:
        if isinstance(error, GPTQError) or is_out_of_memory(error):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise GPTQError(f"{path} cannot be loaded: {first_line(error)}") from error
