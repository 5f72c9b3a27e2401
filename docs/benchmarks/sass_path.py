"""How many machine instructions does a warp execute? The least that its products and loads leave open.

Nobody executes the machine code here. But it is known how often a warp multiplies, scales sums and loads, since its PTX
was run. Of all ways through the machine code with just as many of these, the one with the fewest instructions is taken.
What costs no product and no load, such as adding up the warps' sums at the end, is thus left out.
"""

from __future__ import annotations

import heapq
import re
from dataclasses import dataclass
from typing import NamedTuple


class Marks(NamedTuple):
    """What is counted in PTX and in machine code alike: matrix products, multiply-adds in float32, wide loads."""

    products: int
    scalings: int
    loads: int

    def plus(self, other: Marks) -> Marks:
        """The sum."""
        return Marks(*(a + b for a, b in zip(self, other)))

    def within(self, most: Marks) -> bool:
        """Whether nothing is more than in ``most``."""
        return all(a <= b for a, b in zip(self, most))


_OF_PTX = (r"^mma\.", r"^fma\.rn\.f32", r"^cp\.async\.cg|^ld\.global\S*\.v4")
_OF_SASS = (r"\bHMMA\b", r"\bFFMA\b", r"\bLDGSTS\b|\bLDG\.\S*128")
# ptxas leaves loops by calls, too; one to a function may as well be passed over.
_JUMP = r"\b(?:BRA|CALL\.REL)\b.*?0x([0-9a-f]+)"


def marks_of_ptx(executed: list[tuple[str, int]], warps: int) -> Marks:
    """Of one of the warps. executed: (instruction, times) of all."""
    found = [sum(count for text, count in executed if re.search(each, text)) for each in _OF_PTX]
    if any(count % warps for count in found):
        raise ValueError(f"{found} of {_OF_PTX} do not divide among {warps} warps; take K a multiple of all windows")
    return Marks(*(count // warps for count in found))


@dataclass
class _Block:
    """Instructions without a jump in between; None among those that follow: the end."""

    size: int
    marks: Marks
    following: list[int | None]


def _blocks(sass: str) -> dict[int, _Block]:
    """By address."""
    code = [(int(at, 16), text) for at, text in re.findall(r"^\s+/\*([0-9a-f]{4,5})\*/\s+(.*?);", sass, re.MULTILINE)]
    jumps = {at: int(found[1], 16) for at, text in code if (found := re.search(_JUMP, text))}
    ends = [bool(re.search(r"\b(BRA|CALL|RET|EXIT)\b", text)) for _, text in code]
    firsts = {code[0][0], *jumps.values(), *(code[i + 1][0] for i, end in enumerate(ends[:-1]) if end)}
    blocks, first = {}, 0
    for i, (at, text) in enumerate(code):
        last = i + 1 == len(code)
        if not (last or ends[i] or code[i + 1][0] in firsts):
            continue
        part = [each for _, each in code[first : i + 1]]
        following: list[int | None] = []
        if at in jumps:
            following.append(jumps[at])
        elif "EXIT" in text:
            following.append(None)
        if not last and (not ends[i] or re.search(r"^@|CALL|BRA\S* !?U?P", text)):
            following.append(code[i + 1][0])
        marks = Marks(*(sum(bool(re.search(each, line)) for line in part) for each in _OF_SASS))
        blocks[code[first][0]] = _Block(len(part), marks, following)
        first = i + 1
    return blocks


def fewest_instructions(sass: str, marks: Marks) -> int:
    """Along a way through a kernel that has exactly these marks.

    Raises:
        ValueError: there is none.
    """
    blocks = _blocks(sass)
    start = min(blocks)
    heap: list[tuple[int, int, Marks]] = [(0, start, Marks(0, 0, 0))]
    seen = set()
    while heap:
        cost, at, have = heapq.heappop(heap)
        if at < 0:
            return cost
        if (at, have) in seen:
            continue
        seen.add((at, have))
        block = blocks[at]
        now = have.plus(block.marks)
        if not now.within(marks):
            continue
        for following in block.following:
            if following is not None:
                heapq.heappush(heap, (cost + block.size, following, now))
            elif now == marks:
                heapq.heappush(heap, (cost + block.size, -1, now))
    raise ValueError(f"no way through the kernel has {marks}")
