"""Mistakes that the tests of PTX must notice: each is one edit, of the device code or of what Triton made.

``caught`` says how: an expression that fits the machine's message, or ``WRONG`` where results are wrong.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

WRONG = "wrong values"
# Without a barrier, or before a copy has landed: which of these is met first depends on the order of the warps.
EARLY = "a race: (read|written) after|never written|an asynchronous copy"
NOT_WAITED = "a race: an asynchronous copy to what is read has not been waited for"
OUTSIDE = "of a tensor of"
OUTSIDE_OR_SHARED = OUTSIDE + "|a race: global memory that another thread has written is written"


@dataclass(frozen=True)
class Mutant:
    """A mistake in the CUDA kernels: ``old``, once in ``file`` of the device sources, becomes ``new``."""

    name: str
    file: str
    old: str
    new: str
    caught: str
    bits: int = 4


CUDA = [
    Mutant(
        "the barrier of the wide loop is missing",
        "kernels.cuh",
        "synchronize_block();  // everyone's copies",
        "// everyone's copies",
        EARLY,
    ),
    Mutant(
        "the wide loop waits for one group of copies too few",
        "kernels.cuh",
        "wait_copies<kStages - 2>();",
        "wait_copies<kStages - 1>();",
        NOT_WAITED,
    ),
    Mutant(
        "the barrier before halves of warps exchange sums is missing",
        "kernels.cuh",
        "a lane's together.\n    synchronize_block();",
        "a lane's together.\n",
        EARLY,
    ),
    Mutant(
        "the barrier before the warps' sums are added is missing",
        "kernels.cuh",
        "i % 2] = sums.total[s][t][i];\n    synchronize_block();",
        "i % 2] = sums.total[s][t][i];\n",
        EARLY,
    ),
    Mutant(
        "activations beyond the last column are not masked",
        "kernels.cuh",
        "row < p.rows && column < p.columns\n                        ?",
        "row < p.rows\n                        ?",
        OUTSIDE,
    ),
    Mutant(
        "one strip too many is loaded",
        "kernels.cuh",
        "if (first_strip + s < w.strips)\n                load_words",
        "if (first_strip + s <= w.strips)\n                load_words",
        OUTSIDE,
    ),
    Mutant(
        "the zero point is off by one",
        "tiles.cuh",
        "Magic<T>::bits + zero * 0x00010001u",
        "Magic<T>::bits + (zero + 1) * 0x00010001u",
        WRONG,
    ),
    Mutant(
        "halves of an operand of the matrix instruction are swapped",
        "tiles.cuh",
        "a[s][0], b.x, b.y",
        "a[s][0], b.y, b.x",
        WRONG,
    ),
    Mutant("lop3 has the table of a | b & c", "instructions.cuh", "%3, 0xEA;", "%3, 0xF8;", WRONG),
    Mutant(
        "a chunk ends one unit late",
        "tiles.cuh",
        "(next_chunk + 1) * w.chunk_units;",
        "(next_chunk + 1) * w.chunk_units + 1;",
        WRONG,
    ),
    Mutant("one split too many is added", "kernels.cuh", "split < splits;", "split <= splits;", OUTSIDE),
    Mutant(
        "the bound of the gather is off by one",
        "kernels.cuh",
        "if (slot >= slots) return;",
        "if (slot > slots) return;",
        OUTSIDE_OR_SHARED,
    ),
    Mutant(
        "output channels beyond the last are not masked",
        "kernels.cuh",
        "if (channel >= w.out_features || row >= p.rows) continue;",
        "if (row >= p.rows) continue;",
        OUTSIDE_OR_SHARED,
    ),
    Mutant(
        "the third bit comes from the slot beside it",
        "tiles.cuh",
        "rotate_right(words[2], index)",
        "rotate_right(words[2], index + 1)",
        WRONG,
        bits=3,
    ),
]


@dataclass(frozen=True)
class PtxMutant:
    """A mistake in what Triton made.

    Args:
        pattern, new: as for ``re.sub``.
        which: of the places where the pattern fits, from 0; negative from the end.
    """

    name: str
    kernel: str
    pattern: str
    new: str | Callable[[re.Match[str]], str]
    caught: str
    which: int = 0

    def edit(self, name: str, ptx: str) -> str:
        """The PTX of a kernel, with the mistake in its kernel."""
        if name != self.kernel:
            return ptx
        places = list(re.finditer(self.pattern, ptx))
        assert places, "Triton makes something else now, and with it this mutant has to change"
        place = places[self.which]
        new = self.new(place) if callable(self.new) else place.expand(self.new)
        return ptx[: place.start()] + new + ptx[place.end() :]


WAITED = r"(cp\.async\.wait_group\s+\d+;)\s*bar\.sync\s+0;"
TRITON = [
    PtxMutant("the barrier after the copies is missing", "gemm", WAITED, r"\1", EARLY),
    PtxMutant(
        "the loop waits for one group of copies too few",
        "gemm",
        r"cp\.async\.wait_group\s+([1-9]\d*);",
        lambda found: f"cp.async.wait_group {int(found[1]) + 1};",
        NOT_WAITED,
    ),
    PtxMutant(
        "the copies are not waited for",
        "gemv",
        r"cp\.async\.wait_group\s+1;",
        "",
        NOT_WAITED,
    ),
    PtxMutant("the last barrier but one is missing", "gemv", r"bar\.sync\s+0;", "", EARLY, -2),
    PtxMutant("a sum takes the wrong lane", "gemv", r"(shfl\.sync\S+\s+\S+\s+\S+) 2,", r"\1 4,", "a race: written"),
    PtxMutant("a matrix is loaded transposed", "gemm", r"x4\.shared\.b16", "x4.trans.shared.b16", WRONG),
    PtxMutant("a matrix is not multiplied", "gemm", r"mma\.sync[^;]*;", "", WRONG, 5),
    PtxMutant(
        "two registers of an operand are swapped", "gemm", r"\{ (%r\d+), (%r\d+) \}, \{", r"{ \2, \1 }, {", WRONG
    ),
    PtxMutant("a result is stored without its mask", "gemm", r"@%p\d+ (st\.global)", r"\1", OUTSIDE_OR_SHARED, -1),
    PtxMutant("rows are not masked", "gemm", r"(cp\.async\.ca[^;]*), 0x(\d), %r\d+;", r"\1, 0x\2, 0x\2;", OUTSIDE),
    PtxMutant("a code meets the wrong power of two", "gemm", r"(or\.b16\s+\S+ \S+) 25600", r"\1 25601", WRONG),
    PtxMutant("parts are added without a mask", "add_splits", r"@%p\d+ (ld\.global)", r"\1", OUTSIDE, -1),
]
