"""The errors that a user can cause. Each message says what was got, what was expected and what to do."""

from __future__ import annotations

import torch


class GPTQError(ValueError):
    """Base of the errors below; also a ValueError, which is what frameworks expect."""


class ConfigError(GPTQError):
    """A setting or a ``quantization_config`` that cannot be used."""


class CheckpointError(GPTQError):
    """A checkpoint whose files or tensors do not fit together."""


class CalibrationError(GPTQError):
    """Calibration data that cannot be used."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch's CPU allocator says so by a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(words in str(error) for words in ("CPUAllocator", "out of memory"))
