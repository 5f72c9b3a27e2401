"""The levels that the extension offers are those that the CPU and its system have."""

from __future__ import annotations

import platform
from pathlib import Path

import pytest

cpu = pytest.importorskip("gptq_backend._cpu", reason="no compiler when it was installed")

# Level: what Linux calls the instruction sets that it needs, on either kind of CPU.
NEEDED = {
    "avx2": {"avx2", "fma", "f16c"},
    "avx_vnni": {"avx2", "fma", "f16c", "avx_vnni"},
    "avx512": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq"},
    "avx512_vnni": {"avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512vl", "avx512dq", "avx512_vnni"},
    "neon": {"asimd"},
    "neon_dotprod": {"asimd", "asimddp"},
    "neon_i8mm": {"asimd", "asimddp", "i8mm"},
}


def test_levels_are_those_whose_instruction_sets_linux_names() -> None:
    key, info = {"x86_64": "flags", "aarch64": "Features"}.get(platform.machine()), Path("/proc/cpuinfo")
    lines = [line for line in info.read_text().splitlines() if key and line.startswith(key)] if info.exists() else []
    if not lines:
        pytest.skip("the system does not list the CPU's instruction sets, or an emulator does not")
    found = set(lines[0].partition(":")[2].split())
    assert cpu.levels() == ["generic", *(level for level, needed in NEEDED.items() if needed <= found)]
