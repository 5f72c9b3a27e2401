"""What is asked for: bytes of all weight files, or average bits of the layers."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from ..errors import ConfigError

_UNITS = {"": 1, "k": 10**3, "m": 10**6, "g": 10**9, "ki": 1 << 10, "mi": 1 << 20, "gi": 1 << 30}
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(|[kmg]i?)b?", re.IGNORECASE | re.ASCII)


@dataclass(frozen=True)
class Goal:
    """A budget; one of the two is given.

    Args:
        nbytes: of all weight files together.
        layer_bits: of the quantized layers' codes, scales and zeros, per weight.
    """

    nbytes: int | None = None
    layer_bits: float | None = None

    def __str__(self) -> str:
        return f"{self.nbytes} bytes" if self.nbytes is not None else f"{self.layer_bits:g} bits"


def read_goal(target_size: str | int | None, target_bits: float | None) -> Goal | None:
    """The goal of ``target_size`` (bytes, or text like ``800MB`` and ``1.5 GiB``) or ``target_bits``; None of neither.

    Raises:
        ConfigError: both are given, or one makes no sense.
    """
    if target_size is not None and target_bits is not None:
        raise ConfigError(
            f"target_size={target_size!r} and target_bits={target_bits!r} exclude each other; pass one of them"
        )
    if target_bits is not None:
        if not 0 < target_bits <= 16:  # nor NaN
            raise ConfigError(f"target_bits={target_bits!r} is not supported; use a number of bits from 2 to 9")
        return Goal(layer_bits=float(target_bits))
    return None if target_size is None else Goal(nbytes=_bytes(target_size))


def _bytes(size: str | int) -> int:
    found = _SIZE.fullmatch(str(size).strip())
    nbytes = float(found[1]) * _UNITS[found[2].lower()] if found else 0
    if not 1 <= nbytes < math.inf:  # infinity is what a float makes of some hundred digits
        raise ConfigError(f"target_size={size!r} is not a size; use bytes or a unit, like 800MB (10^6 bytes) or 1.5GiB")
    return int(nbytes)
