"""The errors that a user can cause. Each message says what was got, what was expected and what to do."""


class GPTQError(ValueError):
    """Base of the errors below; also a ValueError, which is what frameworks expect."""


class ConfigError(GPTQError):
    """A setting or a ``quantization_config`` that cannot be used."""


class CheckpointError(GPTQError):
    """A checkpoint whose files or tensors do not fit together."""


class CalibrationError(GPTQError):
    """Calibration data that cannot be used."""
