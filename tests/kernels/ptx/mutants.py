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
        "the barriers before halves of warps exchange sums are missing",
        "kernels.cuh",
        "turn >= 0; --turn) {\n        synchronize_block();",
        "turn >= 0; --turn) {",
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
        "!check || column < columns\n",
        "true\n",
        OUTSIDE,
    ),
    Mutant(
        "one strip too many is loaded",
        "kernels.cuh",
        "smaller(first_strip + s, w.strips - 1)",
        "smaller(first_strip + s, w.strips)",
        OUTSIDE,
    ),
    Mutant(
        "one row too many is loaded",
        "kernels.cuh",
        "smaller(first_row + t * 8 + lane / 4, p.rows - 1)",
        "smaller(first_row + t * 8 + lane / 4, p.rows)",
        OUTSIDE,
    ),
    Mutant(
        "tiles without a check go on for one too many",
        "kernels.cuh",
        "whole >= 2 * kDepth;",
        "whole >= 2 * kDepth - 1;",
        OUTSIDE + "|" + WRONG,
    ),
    Mutant(
        "one row too many is copied to shared memory",
        "kernels.cuh",
        "last_row = p.rows - 1 - first_row;",
        "last_row = p.rows - first_row;",
        OUTSIDE,
    ),
    Mutant(
        "tiles behind the last are copied",
        "kernels.cuh",
        "stage * kStageTiles + tile >= p.weight.tiles",
        "stage * kStageTiles + tile > p.weight.tiles",
        OUTSIDE,
    ),
    Mutant(
        "tiles behind the last are multiplied",
        "kernels.cuh",
        "if (tile >= w.tiles) break;",
        "",
        "never written|" + WRONG,
    ),
    Mutant(
        "both halves of the warps multiply the same tiles",
        "kernels.cuh",
        "own = lane / 4 * kRow + half * kHalf * kTile * 2",
        "own = lane / 4 * kRow",
        WRONG,
    ),
    Mutant(
        "activations of odd rows are not swapped where they are read",
        "kernels.cuh",
        "kept(own + parity * 64), kept(own + 64 - parity * 64)",
        "kept(own), kept(own + 64)",
        WRONG,
    ),
    Mutant(
        "stages are filled one place too late",
        "kernels.cuh",
        "place == (kStages - 1) * kStage ? 0",
        "place == (kStages - 2) * kStage ? 0",
        EARLY + "|" + NOT_WAITED + "|" + WRONG,
    ),
    Mutant(
        "a chunk's first product is added to those of the chunk before",
        "tiles.cuh",
        "if constexpr (First)\n",
        "if constexpr (false)\n",
        WRONG,
    ),
    Mutant(
        "chunks of the other half of the warps are not skipped",
        "tiles.cuh",
        "unit & kUnits ? (unit + kUnits) & -kUnits : unit",
        "unit",
        WRONG,
    ),
    Mutant(
        "the high digit of a byte has the zero point of the low one",
        "tiles.cuh",
        "0xD400D400 + zero * 0x00100010u",
        "0xD400D400 + zero * 0x00010001u",
        WRONG,
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
        "a[s][1], b.z, b.w",
        "a[s][1], b.w, b.z",
        WRONG,
    ),
    Mutant("lop3 has the table of a | b & c", "instructions.cuh", "%3, 0xEA;", "%3, 0xF8;", WRONG),
    Mutant(
        "a chunk ends one unit late",
        "tiles.cuh",
        "(next_chunk + 1) * w.chunk_units - first_unit;",
        "(next_chunk + 1) * w.chunk_units - first_unit + 1;",
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
        "    if (channel >= out_features) return;\n",
        "",
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
