"""The machine that runs PTX on the host: right by the PTX ISA, and strict about what a GPU would forgive at times."""

from __future__ import annotations

import struct
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from tests.kernels.ptx.assemble import AssemblyError, assemble
from tests.kernels.ptx.machine import Machine

pytestmark = pytest.mark.slow  # the machine is compiled for half a minute

PREAMBLE = """
    mov.u32 %t, %tid.x;
    ld.param.u64 %in, [k_param_0];
    ld.param.u64 %out, [k_param_1];
    mul.wide.u32 %at, %t, 16;
    add.s64 %in, %in, %at;
    add.s64 %out, %out, %at;
    mov.u32 %s, memory;
    shl.b32 %own, %t, 4;
    add.s32 %own, %s, %own;
"""


def run(
    machine: Machine, body: str, rows: Sequence[Sequence[int]], threads: int = 32, shared: int = 4096, seed: int = 0
) -> Tensor:
    """Thread t has four words at [%in] and [%out], and 16 bytes of shared memory at [%own] -> what it writes.

    Args:
        rows: int [n, 4], of thread t row t % n.
    """
    ptx = f"""
.extern .shared .align 16 .b8 memory[];
.visible .entry k(
    .param .u64 k_param_0,
    .param .u64 k_param_1
)
{{
{PREAMBLE}
{body}
ret;
}}
"""
    machine.load(ptx)
    machine.seed(seed)
    wrapped = [[(word + (1 << 31)) % (1 << 32) - (1 << 31) for word in row] for row in rows]
    x = torch.tensor(wrapped, dtype=torch.int32).repeat(-(-threads // len(rows)), 1)[:threads].contiguous()
    y = torch.zeros_like(x)
    with machine.memory(x, y):
        machine.launch("k", (1,), threads, shared, (x, y))
    return y


def bits_of(*values: float, dtype: torch.dtype = torch.float32) -> list[int]:
    """Words: float32, or two 16-bit floats each, the lower one first."""
    if dtype == torch.float32:
        return list(struct.unpack(f"<{len(values)}I", struct.pack(f"<{len(values)}f", *values)))
    return torch.tensor(values, dtype=torch.float32).to(dtype).view(torch.int32).tolist()


LOAD = "ld.global.v4.b32 {%a, %b, %c, %d}, [%in];\n"
STORE = "\nst.global.b32 [%out], %r;"
FIRST_TWO = [0x12345678, 0x9ABCDEF0, 0, 0]


@pytest.mark.parametrize(
    ("code", "words", "expected"),
    [
        ("add.s32 %r, %a, %b", [0x7FFFFFFF, 1, 0, 0], 0x80000000),
        ("sub.s32 %r, %a, 1", [0, 0, 0, 0], 0xFFFFFFFF),
        ("mul.hi.s32 %r, %a, %b", [0x80000000, 3, 0, 0], 0xFFFFFFFE),
        ("mul.wide.s32 %w, %a, %b; cvt.u32.u64 %r, %w", [0xFFFFFFFF, 5, 0, 0], 0xFFFFFFFB),
        ("mul.wide.s16 %r, %a, 4", [0xFFFF, 0, 0, 0], 0xFFFFFFFC),
        ("mad.lo.s32 %r, %a, %b, %c", [7, 6, 0xFFFFFFFF, 0], 41),
        ("div.s32 %r, %a, %b", [0xFFFFFFF9, 2, 0, 0], 0xFFFFFFFD),  # towards zero
        ("shr.s32 %r, %a, 40", [0x80000000, 0, 0, 0], 0xFFFFFFFF),  # further than there are bits
        ("shr.u32 %r, %a, %b", [0x80000000, 31, 0, 0], 1),
        ("shl.b32 %r, %a, %b", [1, 32, 0, 0], 0),
        ("shf.r.wrap.b32 %r, %a, %b, 36", [0x12345678, 0x9ABCDEF0, 0, 0], 0x01234567),
        ("bfe.u32 %r, %a, 8, 12", [0x12345678, 0, 0, 0], 0x456),
        ("bfe.s32 %r, %a, 4, 4", [0x00000080, 0, 0, 0], 0xFFFFFFF8),
        ("bfe.s32 %r, %a, 28, 8", [0x80000000, 0, 0, 0], 0xFFFFFFF8),  # beyond the end: the sign
        ("bfi.b32 %r, %a, %b, 4, 8", [0xFFFFFFAB, 0x12345678, 0, 0], 0x12345AB8),
        ("prmt.b32 %r, %a, %b, 0x7531", FIRST_TWO, 0x9ADE1256),
        ("prmt.b32 %r, %a, %b, 0xC8F0", FIRST_TWO, 0xFF00FF78),  # copies of signs
        ("lop3.b32 %r, %a, %b, %c, 0xEA", [0xF0F0, 0xFF00, 0x000F, 0], 0xF00F),  # a & b | c
        ("lop3.b32 %r, %a, %b, %c, 0x30", [0b1100, 0b1010, 0, 0], 0b0100),  # a & ~b
        ("not.b32 %r, %a", [0x0F0F0F0F, 0, 0, 0], 0xF0F0F0F0),
        ("setp.lt.s32 %p1, %a, %b; selp.b32 %r, 1, 2, %p1", [0xFFFFFFFF, 0, 0, 0], 1),
        ("setp.lt.u32 %p1, %a, %b; selp.b32 %r, 1, 2, %p1", [0xFFFFFFFF, 0, 0, 0], 2),
        ("setp.nan.f32 %p1, %a, %b; selp.b32 %r, 1, 2, %p1", [0x7FC00000, 0, 0, 0], 1),
        ("setp.ne.f32 %p1, %a, %b; selp.b32 %r, 1, 2, %p1", [0x7FC00000, 0, 0, 0], 2),  # nothing holds for NaN
        ("mov.b32 {%lo, %hi}, %a; mov.b32 %r, {%hi, %lo}", [0x12345678, 0, 0, 0], 0x56781234),
        ("cvt.s32.s16 %r, %a", [0x8000, 0, 0, 0], 0xFFFF8000),
        ("cvt.u16.u32 %lo, %a; cvt.u32.u16 %r, %lo", [0x12345678, 0, 0, 0], 0x5678),
        ("mov.f32 %r, 0f40490FDB", [0, 0, 0, 0], 0x40490FDB),
    ],
)
def test_integers_and_bits(code: str, words: list[int], expected: int, machine: Machine) -> None:
    y = run(machine, LOAD + code + ";" + STORE, [words])
    assert y[:, 0].tolist() == [(expected + (1 << 31)) % (1 << 32) - (1 << 31)] * 32


@pytest.mark.parametrize(
    ("code", "words", "expected"),
    [
        ("fma.rn.f32 %r, %a, %b, %c", bits_of(1 + 2**-23, 1 + 2**-23, -1 - 2**-22, 0), bits_of(2**-46)),
        ("mul.f32 %r, %a, %b", bits_of(1e-30, 1e-10, 0, 0), bits_of(1e-40)),  # subnormal numbers stay
        ("cvt.rn.f16.f32 %r, %a", bits_of(1 + 2**-11, 0, 0, 0), [0x3C00]),  # a tie, to even
        ("cvt.rn.f16.f32 %r, %a", bits_of(65520, 0, 0, 0), [0x7C00]),
        ("cvt.rn.bf16.f32 %r, %a", bits_of(1 + 3 * 2**-8, 0, 0, 0), [0x3F82]),
        ("cvt.rn.bf16x2.f32 %r, %a, %b", bits_of(1, 2, 0, 0), [0x3F804000]),  # the first is the upper one
        ("cvt.f32.f16 %r, %a", [0x0001, 0, 0, 0], bits_of(2**-24)),
        ("cvt.f32.bf16 %r, %a", [0x4049, 0, 0, 0], [0x40490000]),
        ("cvt.rn.f16.u32 %r, %a", [1027, 0, 0, 0], [0x6403]),
        ("cvt.rn.f32.u32 %r, %a", [0xFFFFFFFF, 0, 0, 0], bits_of(2.0**32)),
        ("sub.f16x2 %r, %a, %b", [0x64036404, 0x64016408, 0, 0], bits_of(-4, 2, dtype=torch.float16)),
        ("fma.rn.bf16x2 %r, %a, 0xBF80BF80, %b", [0x43084300, 0x43014305, 0, 0], bits_of(5, -7, dtype=torch.bfloat16)),
        ("add.f16 %r, %a, %b", [0x3C00, 0x1001, 0, 0], [0x3C01]),  # 2**-11 and a bit more: above the tie
    ],
)
def test_floats_are_rounded_once_and_to_even(
    code: str, words: list[int], expected: list[int], machine: Machine
) -> None:
    y = run(machine, LOAD + code + ";" + STORE, [words])
    assert y[5, 0].item() & 0xFFFFFFFF == expected[0] & 0xFFFFFFFF


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("depth", [8, 16])
def test_a_matrix_product_has_the_layout_of_the_isa(dtype: torch.dtype, depth: int, machine: Machine) -> None:
    """Matrices of small integers are dealt to the lanes as the ISA says."""
    a, b = torch.randint(-8, 8, (16, depth)).to(dtype), torch.randint(-8, 8, (depth, 8)).to(dtype)
    rows = []
    for lane in range(32):
        g, t = divmod(lane, 4)
        pairs = [a[g + i % 2 * 8, i // 2 * 8 + 2 * t :][:2] for i in range(depth // 4)]
        pairs += [b[i * 8 + 2 * t :, g][:2] for i in range(depth // 8)]
        rows.append([int(pair.contiguous().view(torch.int32)) for pair in pairs])
    words = torch.tensor([(row + [0] * 8)[:8] for row in rows], dtype=torch.int32)
    y, name = torch.zeros(32, 4), "bf16" if dtype == torch.bfloat16 else "f16"
    left, right = ("{%x0, %x1, %x2, %x3}", "{%x4, %x5}") if depth == 16 else ("{%x0, %x1}", "{%x2}")
    operands = f"{{%y0, %y1, %y2, %y3}}, {left}, {right}, {{%one, %one, %one, %one}}"
    machine.load(f"""
.visible .entry k(.param .u64 k_param_0, .param .u64 k_param_1)
{{
    mov.u32 %t, %tid.x;
    ld.param.u64 %in, [k_param_0];
    ld.param.u64 %out, [k_param_1];
    mad.wide.u32 %in, %t, 32, %in;
    mad.wide.u32 %out, %t, 16, %out;
    ld.global.v4.b32 {{%x0, %x1, %x2, %x3}}, [%in];
    ld.global.v4.b32 {{%x4, %x5, %x6, %x7}}, [%in+16];
    mov.f32 %one, 0f3F800000;
    mma.sync.aligned.m16n8k{depth}.row.col.f32.{name}.{name}.f32 {operands};
    st.global.v4.f32 [%out], {{%y0, %y1, %y2, %y3}};
    ret;
}}""")
    with machine.memory(words, y):
        machine.launch("k", (1,), 32, 0, (words, y))
    found = torch.empty(16, 8)
    for lane in range(32):
        for i in range(4):
            found[lane // 4 + i // 2 * 8, lane % 4 * 2 + i % 2] = y[lane, i]
    assert torch.equal(found, a.float() @ b.float() + 1)


@pytest.mark.parametrize("trans", [False, True])
def test_matrices_are_loaded_as_the_matrix_instruction_wants_them(trans: bool, machine: Machine) -> None:
    """Row r of matrix m is in the 16 bytes of thread 8 m + r."""
    halves = torch.arange(32 * 8, dtype=torch.int16)
    y = run(
        machine,
        LOAD + "st.shared.v4.b32 [%own], {%a, %b, %c, %d};\nbar.warp.sync -1;\n"
        f"ldmatrix.sync.aligned.m8n8.x4{'.trans' * trans}.shared.b16 {{%a, %b, %c, %d}}, [%own];\n"
        "st.global.v4.b32 [%out], {%a, %b, %c, %d};",
        halves.view(torch.int32).view(32, 4).tolist(),
    )
    matrices = halves.view(4, 8, 8).mT if trans else halves.view(4, 8, 8)
    expected = matrices.reshape(4, 32, 2).transpose(0, 1).contiguous().view(torch.int32).view(32, 4)
    assert torch.equal(y, expected)


def test_a_shuffle_exchanges_lanes(machine: Machine) -> None:
    y = run(machine, "shfl.sync.bfly.b32 %r, %t, 5, 31, -1;" + STORE, [[0] * 4], threads=64)
    assert y[:, 0].tolist() == [32 * (t // 32) + (t % 32 ^ 5) for t in range(64)]
    y = run(machine, "shfl.sync.idx.b32 %r, %t, 7, 31, -1;" + STORE, [[0] * 4], threads=64)
    assert y[:, 0].tolist() == [32 * (t // 32) + 7 for t in range(64)]


def test_lanes_that_part_meet_again(machine: Machine) -> None:
    """Lane t goes round t times; then all shuffle."""
    body = """
    mov.u32 %i, 0;
$again:
    setp.ge.u32 %p1, %i, %t;
    @%p1 bra $done;
    add.s32 %i, %i, 1;
    bra.uni $again;
$done:
    shfl.sync.bfly.b32 %r, %i, 1, 31, -1;"""
    assert run(machine, body + STORE, [[0] * 4])[:, 0].tolist() == [t ^ 1 for t in range(32)]


WRITE, READ_NEXT = (
    "st.shared.b32 [%own], %t;\n",
    "add.s32 %n, %t, 1; rem.u32 %n, %n, %ntid.x; shl.b32 %n, %n, 4; add.s32 %n, %n, %s;\nld.shared.b32 %r, [%n];\n",
)


@pytest.mark.parametrize(("between", "threads"), [("bar.sync 0;", 64), ("bar.warp.sync -1;", 32)])
def test_a_barrier_orders_a_write_before_a_read(between: str, threads: int, machine: Machine) -> None:
    for seed in range(5):
        y = run(machine, WRITE + between + READ_NEXT + STORE, [[0] * 4], threads, seed=seed)
        assert y[:, 0].tolist() == [(t + 1) % threads for t in range(threads)]


COPY = "cp.async.cg.shared.global [%own], [%in], 16;\ncp.async.commit_group;\n"
READ_OWN = "ld.shared.b32 %r, [%own];\n"


def test_copies_have_landed_when_they_were_waited_for(machine: Machine) -> None:
    waited = COPY + COPY.replace("%own", "%own+1024").replace("16;", "16, 4;") + "cp.async.wait_group 0;\n"
    rows = [[t + 1, 2, 3, 4] for t in range(32)]
    assert torch.equal(run(machine, waited + READ_OWN + STORE, rows)[:, 0], torch.arange(32, dtype=torch.int32) + 1)
    both = "ld.shared.v4.b32 {%a, %b, %c, %d}, [%own+1024]; st.global.v4.b32 [%out], {%a, %b, %c, %d};"
    assert run(machine, waited + both, rows)[3].tolist() == [4, 0, 0, 0]  # zeros beyond the 4 bytes


PART = "setp.lt.u32 %p1, %t, 7;\n"
OF_THREAD_0 = "ld.param.u64 %w, [k_param_1];\n"
FAULTS = [
    ("a race: read after a write of thread", WRITE + READ_NEXT),
    (  # of another warp
        "a race: (read after a write|written after a read) of thread",
        WRITE + "bar.sync 0;\nst.shared.b32 [%own], 7;\nbar.warp.sync -1;\n" + READ_NEXT,
    ),
    ("a race: written after a read of thread", WRITE + "bar.sync 0;\n" + READ_NEXT + "st.shared.b32 [%own], 7;"),
    ("a race: written after a write of thread", "st.shared.b32 [%s], %t;"),
    ("an asynchronous copy to what is read has not", COPY + READ_OWN),
    ("an asynchronous copy to what is read has not", COPY + "cp.async.wait_group 1;\n" + READ_OWN),
    ("an asynchronous copy to what is written has not", COPY + WRITE),
    (
        "global memory that another thread has written is read",
        OF_THREAD_0 + "st.global.b32 [%out], %t; ld.global.b32 %r, [%w];",
    ),
    ("global memory that another thread has written is written", OF_THREAD_0 + "st.global.b32 [%w], %t;"),
    ("shared memory that was never written", READ_OWN),
    ("outside of the 4096 bytes of shared memory", "st.shared.b32 [%own+4000], %t;"),
    ("byte 1024 of a tensor of 1024 bytes", "ld.global.b32 %r, [%in+16];"),
    ("byte 1024 of a tensor of 1024 bytes", "cp.async.cg.shared.global [%own], [%in+16], 16;"),
    ("outside of every tensor", "mov.u64 %w, 64; ld.global.b32 %r, [%w];"),
    ("a misaligned access to shared memory", "ld.shared.v2.b32 {%a, %b}, [%own+4];"),
    ("a misaligned access to global memory", "st.global.v2.b32 [%out+4], {%t, %t};"),
    ("lanes of the warp have ended or are switched off", PART + "@%p1 ret;\nshfl.sync.bfly.b32 %r, %t, 1, 31, -1;"),
    ("lanes of the warp have ended or are switched off", PART + "@%p1 shfl.sync.bfly.b32 %r, %t, 1, 31, -1;"),
    (
        "some lanes of a warp wait here, the others at `bar.sync 0`",
        PART + "@%p1 bra $else; shfl.sync.bfly.b32 %r, %t, 1, 31, -1; bra $end;\n$else:\nbar.sync 0;\n$end:",
    ),
    ("the block does not end", "$again:\nbra.uni $again;"),
]


@pytest.mark.parametrize(("what", "body"), FAULTS)
def test_what_no_kernel_may_do(what: str, body: str, machine: Machine) -> None:
    with pytest.raises(RuntimeError, match=rf"k, block \(0, 0, 0\), `[a-z@].*`: .*{what}"):
        run(machine, body, [[0] * 4], threads=64)


def test_what_the_machine_does_not_know_is_said() -> None:
    entry = ".visible .entry k()\n{\n%s\nret;\n}"
    with pytest.raises(AssemblyError, match=r"k: cannot read oops in `mov.u32 %r, oops`"):
        assemble(entry % "mov.u32 %r, oops;")
    with pytest.raises(AssemblyError, match=r"k: cannot read `\?\?`"):
        assemble(entry % "??;")
    with pytest.raises(AssemblyError, match="shared memory of a fixed size"):
        assemble("    .shared .align 4 .b8 x[16];\n" + entry % "")


def test_an_unknown_instruction_is_said(machine: Machine) -> None:
    with pytest.raises(AssemblyError, match=r"k: the machine has no tanh.approx.f32 \(`tanh.approx.f32 %r, %a`\)"):
        run(machine, "tanh.approx.f32 %r, %a;", [[0] * 4])


def test_executions_are_counted(machine: Machine) -> None:
    run(machine, PART + "@%p1 mov.u32 %r, 0;\n@!%p1 bra $end;\nmov.u32 %r, 1;\n$end:", [[0] * 4], threads=64)
    counts = dict(machine.executed("k"))
    assert counts["setp.lt.u32 %p1, %t, 7"] == 2
    assert counts["mov.u32 %r, 1"] == 1  # by the first warp
