"""Which settings there are, and what their values mean. Needs nothing but Python: the command line reads it early."""

from __future__ import annotations

from typing import NamedTuple


class Format(NamedTuple):
    """How a ``checkpoint_format`` stores zeros and codes.

    Args:
        zero_offset: what to add to a stored zero.
        planar_bits: widths of codes that lie in planes; others lie one after another.
    """

    zero_offset: int
    planar_bits: tuple[int, ...] = ()


FORMATS = {"gptq": Format(zero_offset=1), "gptq_v2": Format(zero_offset=0), "gptq_p": Format(0, planar_bits=(3,))}
