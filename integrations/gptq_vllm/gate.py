"""Whether the installed vLLM can be served, and in one sentence why not."""

from __future__ import annotations

import functools

from packaging.version import InvalidVersion, Version

from .compat import vllm_version
from .contract import InstalledTree, differences

OLDEST, NEWEST = (0, 30), (0, 33)  # releases of vLLM that the tests run against, first and last
_SHOWN = 3  # differences in a sentence

_OTHERWISE = "or start vLLM with VLLM_PLUGINS='' to let its own GPTQ serve the checkpoint"


def too_old(version: str) -> str | None:
    """Why a vLLM that calls itself ``version`` is not served, or None when it may be."""
    release = _release(version)
    if release is None or release >= OLDEST:
        return None
    return (
        f"gptq-backend serves vLLM {_text(OLDEST)} and newer, and vLLM {version} is installed; install a newer vLLM, "
        f"{_OTHERWISE}"
    )


def untested(version: str) -> str | None:
    """A warning about a vLLM that is newer than those of the tests, or None."""
    release = _release(version)
    if release is None or release <= NEWEST:
        return None
    return (
        f"vLLM {version} is newer than {_text(NEWEST)}, the last that this gptq-backend was tested with; all that it "
        "uses of vLLM is still there, so it serves; if something fails, install a newer gptq-backend"
    )


@functools.cache
def why_not() -> str | None:
    """Why the installed vLLM is not served, or None when it is. Imports what serving needs."""
    version = vllm_version()
    if (reason := too_old(version)) is not None:
        return reason
    if not (found := differences(InstalledTree())):
        return None
    more = f" and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return (
        f"vLLM {version} has changed what gptq-backend uses of it ({'; '.join(found[:_SHOWN])}{more}), which is as "
        f"expected in vLLM {_text(OLDEST)} to {_text(NEWEST)}; install such a vLLM or a newer gptq-backend, "
        f"{_OTHERWISE}"
    )


def _release(version: str) -> tuple[int, ...] | None:
    """Major and minor number; None for a source tree that does not know its own."""
    try:
        parsed = Version(version)
    except InvalidVersion:  # "dev"
        return None
    release = parsed.release[:2]
    # What setuptools-scm calls a clone without tags.
    return None if parsed.is_devrelease and release == (0, 1) else release


def _text(release: tuple[int, int]) -> str:
    return ".".join(map(str, release))
