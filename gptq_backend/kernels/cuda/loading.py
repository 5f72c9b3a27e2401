"""Which kernels are loaded on which device, and why not."""

from __future__ import annotations

import functools
import importlib
import logging
import platform
import threading
from typing import Any

from .machine_code import OLDEST, images

logger = logging.getLogger(__name__)

DRIVER = "libcuda.so.1"
extension: Any
MISSING = ""
try:
    extension = importlib.import_module("gptq_backend._cuda")
except ImportError as error:
    extension = None
    MISSING = f"the extension that launches CUDA kernels is not there ({error}); " + (
        "install a C++ compiler, and then gptq-backend again with pip's options --no-cache-dir --force-reinstall "
        "--no-deps"
        if platform.system() == "Linux"
        else "there is one for Linux only"
    )
_LOCK = threading.RLock()


@functools.cache
def open_driver() -> str | None:
    """Find the driver once, None, or why there is none."""
    if extension is None:
        return MISSING
    try:
        extension.open_driver(DRIVER)
    except RuntimeError as error:
        return str(error)
    return None


@functools.cache
def unfit(device: int, bits: int) -> str | None:
    """Load the kernels for codes of ``bits`` bits on a device -> None, or why they cannot be used there.

    The answer is found once. Loading is allowed while a CUDA graph is captured, but may compile for seconds.
    """
    with _LOCK:
        if reason := open_driver():
            return reason
        try:
            capability = extension.capability(device)
        except RuntimeError as error:
            return str(error)
        if capability < OLDEST:
            return f"compute capability {capability / 10}, expected {OLDEST / 10} or newer"
        reasons = []
        for image in images(bits, capability):
            try:
                extension.load(device, bits, image.get())
            except (RuntimeError, OSError) as error:  # CompileError is one
                reasons.append(f"{image.origin}: {error}")
                continue
            logger.info("CUDA device %d: kernels for %d bits, %s", device, bits, image.origin)
            return None
        return f"no machine code for compute capability {capability / 10} ({'; '.join(reasons)})"


def require(device: int, bits: int) -> None:
    """Load the kernels unless they are loaded.

    Raises:
        RuntimeError: they cannot be.
    """
    if reason := unfit(device, bits):
        raise RuntimeError(f"the CUDA kernels do not run on device {device}: {reason}")
