"""What does a kernel in PTX say, instruction by instruction? Names become numbers of registers.

Operands are flattened: ``{a, b}`` is a, b; ``[a+8]`` is a and the constant 8. Constants are registers that nobody
writes. What the machine knows of an operation is its name without hints for caches (host/*.cpp).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

# The first registers, in the order of host/machine.h.
SPECIAL = ("%tid.x", "%ntid.x", "%ctaid.x", "%ctaid.y", "%ctaid.z", "%nctaid.x", "%nctaid.y", "%nctaid.z")
# Where shared memory begins (host/memory.h).
SHARED_BASE = 0x400

_ENTRY = re.compile(r"\.entry\s+(\w+)\s*\((.*?)\)([^{}]*)\{\n(.*?)\n\}", re.DOTALL)
_PARAMETER = re.compile(r"\.param\s+(?:\.align\s+(\d+)\s+)?\.[bufs](\d+)\s+[^,]*?(\w+)(?:\[(\d+)\])?\s*(?:,|$)")
_STATEMENT = re.compile(r"(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*)", re.DOTALL)
_OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")
_IGNORED = (".loc", ".pragma", ".section", ".reg")  # .reg: registers are numbered as they come
_HINTS = re.compile(r"\.(?:nc|uni|L1::\w+|L2::\w+)(?=\.|$)")


class AssemblyError(ValueError):
    """The text has something that the assembler does not know."""


@dataclass
class Instruction:
    """One instruction: by number, the guard (-1: none) and the operands; of a branch, the one it leads to."""

    operation: str
    operands: list[int]
    text: str
    guard: int = -1
    negated: bool = False


@dataclass
class Program:
    """A kernel.

    Args:
        parameters: offset and bytes of each.
        constants: value by register.
    """

    name: str
    parameters: list[tuple[int, int]]
    slots: int = len(SPECIAL)
    constants: dict[int, int] = field(default_factory=dict)
    code: list[Instruction] = field(default_factory=list)

    @property
    def parameter_bytes(self) -> int:
        return max((offset + size for offset, size in self.parameters), default=0)


def assemble(ptx: str) -> dict[str, Program]:
    """All kernels of a module, by name.

    Raises:
        AssemblyError: with the statement.
    """
    text = re.sub(r"//.*", "", ptx)
    shared = re.findall(r"\.extern\s+\.shared\b.*?(\w+)\[\]", text)
    if re.search(r"^\s*\.shared\b", text, re.MULTILINE):
        raise AssemblyError("shared memory of a fixed size is not supported")
    programs = {}
    for name, parameters, _, body in _ENTRY.findall(text):
        programs[name] = _Assembler(name, parameters, shared).program(body)
    return programs


class _Assembler:
    def __init__(self, name: str, parameters: str, shared: list[str]) -> None:
        self._registers = {special: number for number, special in enumerate(SPECIAL)}
        self._symbols = dict.fromkeys(shared, SHARED_BASE)
        layout, at = [], 0
        for align, bits, parameter, count in _PARAMETER.findall(parameters):
            size = int(bits) // 8 * int(count or 1)
            unit = int(align) if count else size  # a pointer's is what it points to
            at = -(-at // unit) * unit
            self._symbols[parameter] = at
            layout.append((at, size))
            at += size
        self._made = Program(name, layout)

    def program(self, body: str) -> Program:
        """The kernel with this body."""
        statements, labels = [], {}
        for line in _lines(body):
            if label := re.fullmatch(r"(\$\w+):", line):
                labels[label[1]] = len(statements)
            else:
                statements.append(line)
        for text in statements:
            self._made.code.append(self._instruction(text, labels))
        self._made.slots = len(self._registers)
        return self._made

    def _instruction(self, text: str, labels: dict[str, int]) -> Instruction:
        found = _STATEMENT.fullmatch(text)
        if not found:
            raise AssemblyError(f"{self._made.name}: cannot read `{text}`")
        negated, guard, name, rest = found.groups()
        operands = _OPERAND.findall(rest)
        operation = _HINTS.sub("", name)
        if operation == "bra":
            numbers = [labels[operands[0]]]
        else:
            if operation.startswith("mov.") and "{" in rest:  # of several registers
                operation = operation.replace("mov", "unpack" if operands[0].startswith("{") else "pack")
            numbers = [number for operand in operands for number in self._numbers(operand, text)]
        return Instruction(operation, numbers, text, self._register(guard) if guard else -1, bool(negated))

    def _numbers(self, operand: str, text: str) -> Iterator[int]:
        if operand.startswith("{"):
            for part in operand.strip("{} ").split(","):
                yield self._number(part.strip(), text)
        elif operand.startswith("["):
            base, _, offset = operand.strip("[] ").partition("+")
            yield self._number(base.strip(), text)
            yield self._number(offset.strip() or "0", text)
        else:
            yield self._number(operand, text)

    def _number(self, operand: str, text: str) -> int:
        if operand == "_" or operand.startswith("%"):
            return self._register(operand)
        if operand in self._symbols:
            return self._constant(self._symbols[operand])
        if re.fullmatch(r"0[fd][0-9A-Fa-f]+", operand):
            return self._constant(int(operand[2:], 16))
        try:
            return self._constant(int(operand.rstrip("U"), 0))
        except ValueError:
            raise AssemblyError(f"{self._made.name}: cannot read {operand} in `{text}`") from None

    def _register(self, name: str) -> int:
        return self._registers.setdefault(name, len(self._registers))

    def _constant(self, value: int) -> int:
        number = self._register(f"={value}")
        self._made.constants[number] = value & (1 << 64) - 1
        return number


def _lines(body: str) -> Iterator[str]:
    """Statements without their semicolons, and labels with their colons."""
    for line in body.splitlines():
        line = line.strip()
        if line.startswith(_IGNORED):
            continue
        for part in line.split(";"):
            if part := re.sub(r"\s+", " ", part.strip()):
                yield part
