"""Whether the installed torch and transformers can be served, and in one sentence why not."""

from __future__ import annotations

import functools
import logging

import torch
import transformers
from packaging.version import Version

from gptq_backend import GPTQError

logger = logging.getLogger(__name__)

# The first and last that the tests run with (docs/quickstart.md#versions); pyproject.toml asks for the first.
TESTED = {"torch": ((2, 6), (2, 15)), "transformers": ((4, 56), (5, 24))}


def too_old(package: str, version: str) -> str | None:
    """Why a ``package`` that calls itself ``version`` is not served, or None when it is."""
    oldest, _ = TESTED[package]
    if Version(version).release[:2] >= oldest:
        return None
    return (
        f"{package} {version} is installed, and gptq-backend needs {_text(oldest)} or newer; "
        f"run: pip install --upgrade {package}"
    )


def untested(package: str, version: str) -> str | None:
    """A warning about a ``package`` that is newer than those of the tests, or None."""
    _, newest = TESTED[package]
    if Version(version).release[:2] <= newest:
        return None
    return (
        f"{package} {version} is newer than {_text(newest)}, the last that this gptq-backend was tested with; if "
        f"something fails, install a newer gptq-backend, or {package} {_text(newest)}"
    )


def changed(error: Exception) -> str:
    """What to say where an import of something of transformers failed with ``error``."""
    oldest, newest = map(_text, TESTED["transformers"])
    return (
        f"transformers {transformers.__version__} has changed what gptq-backend uses of it ({error}), which is as "
        f"expected in transformers {oldest} to {newest}; install such a one, or a newer gptq-backend"
    )


def refuse_older() -> None:
    """Raises:
    GPTQError: the installed torch or transformers is too old.
    """
    for package, version in _installed().items():
        if (reason := too_old(package, version)) is not None:
            raise GPTQError(reason)


@functools.cache
def warn_of_newer() -> None:
    """Warn once in a process."""
    for package, version in _installed().items():
        if (warning := untested(package, version)) is not None:
            logger.warning("%s", warning)


def _installed() -> dict[str, str]:
    return {"torch": torch.__version__, "transformers": transformers.__version__}


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
