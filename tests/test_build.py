"""What setup.py builds with compilers that know less than the newest ones."""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from gptq_backend.kernels import cpu

pytest.importorskip("pybind11", reason="the build imports it; it is part of the test extra")
pytestmark = [
    pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="refuses flags of x86-64"),
    pytest.mark.skipif(shutil.which("g++") is None, reason="there is no g++"),
]

ROOT = Path(__file__).parents[1]
# Optimizing would take minutes, and what is tested are the flags. An EMPTY file is compiled in place of a SKIPPED one.
COMPILER = """#!/bin/sh
for each in "$@"; do
    shift
    case "$each" in
        REFUSED) echo "g++: error: unrecognized command-line option '$each'" >&2; exit 1 ;;
        SKIPPED) set -- "$@" EMPTY ;;
        -O3) set -- "$@" -O0 ;;
        *) set -- "$@" "$each" ;;
    esac
done
exec g++ "$@" EXTRA
"""
# It knows no VNNI in the encoding of AVX, which needs the prefix.
ASSEMBLER = """#!/bin/sh
for each in "$@"; do
    if [ -f "$each" ] && grep -q '{vex}' "$each"; then
        echo "$each:7: Error: unknown pseudo prefix" >&2
        exit 1
    fi
done
exec as "$@"
"""
NOTHING = "--nothing"
INHERITED = (
    "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS", "LDSHARED", "LDCXXSHARED", "ARCHFLAGS", "GPTQ_BACKEND_SANITIZE",
    "GPTQ_BACKEND_REQUIRE_NATIVE", "_PYTHON_HOST_PLATFORM",
)  # fmt: skip


def script(path: Path, text: str) -> Path:
    path.write_text(text)
    path.chmod(0o755)
    return path


def build(
    folder: Path, refused: str = NOTHING, extra: str = "", compiled: bool = False, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Build into ``folder`` with a g++ that refuses options; of the sources, only probes unless ``compiled``."""
    empty = folder / "empty.cpp"
    empty.touch()
    text = COMPILER.replace("REFUSED", refused).replace("EXTRA", extra)
    text = text.replace("SKIPPED", NOTHING if compiled else "csrc/*.cpp").replace("EMPTY", str(empty))
    compiler = str(script(folder / "some-g++", text))
    inherited = {key: value for key, value in os.environ.items() if key not in INHERITED}
    return subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(folder), "--build-temp", str(folder / "temp")],
        env=inherited | {"CC": compiler, "CXX": compiler, "GPTQ_BACKEND_CUDA": "0"} | environment,
        capture_output=True,
        text=True,
        cwd=ROOT,
    )


def built(folder: Path) -> set[str]:
    """The levels with an object file."""
    return {path.stem.removeprefix("level_") for path in (folder / "temp/csrc/cpu").glob("level_*.o")} - {"generic"}


@pytest.mark.timeout(900)  # it compiles all sources
@pytest.mark.skipif(cpu._cpu is None, reason="the levels that were built are not known")
def test_an_old_compiler_builds_the_levels_that_it_can(tmp_path: Path) -> None:
    done = build(tmp_path, "-mavxvnni|-mavx512*", compiled=True)
    assert done.returncode == 0, done.stderr
    assert "the CPU kernels are built without avx_vnni, avx512, avx512_vnni" in done.stderr
    assert "does not know -mavx512bw -mavx512dq -mavx512f -mavx512vl -mavx512vnni -mavxvnni" in done.stderr
    code = f"""
import importlib.util, json
spec = importlib.util.spec_from_file_location("gptq_backend._cpu", {str(tmp_path / "gptq_backend" / "_cpu.abi3.so")!r})
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
print(json.dumps([module.levels(), module.level()]))
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    levels = [name for name in cpu._cpu.levels() if name in ("generic", "avx2")]
    assert json.loads(found.stdout) == [levels, levels[-1]]


def test_after_a_newer_compiler_was_installed_all_is_built_again(tmp_path: Path) -> None:
    old = build(tmp_path, "-mavxvnni")
    assert old.returncode == 0, old.stderr
    assert "(g++: error: unrecognized command-line option '-mavxvnni')" in old.stderr
    assert "pip install --no-cache-dir --force-reinstall" in old.stderr
    assert built(tmp_path) == {"avx2", "avx512", "avx512_vnni"}
    module = tmp_path / "gptq_backend" / "_cpu.abi3.so"
    first = module.stat().st_mtime_ns
    new = build(tmp_path)
    assert new.returncode == 0, new.stderr
    assert "are built without" not in new.stderr
    assert built(tmp_path) == {"avx2", "avx_vnni", "avx512", "avx512_vnni"}
    second = module.stat().st_mtime_ns
    assert second > first
    assert build(tmp_path).returncode == 0
    assert module.stat().st_mtime_ns == second  # up to date


def test_an_old_assembler_builds_the_levels_that_it_can(tmp_path: Path) -> None:
    script(tmp_path / "as", ASSEMBLER)
    done = build(tmp_path, extra=f"-B{tmp_path}")
    assert done.returncode == 0, done.stderr
    assert "are built without avx_vnni: the compiler or its assembler does not know -mavxvnni (" in done.stderr
    assert "Error: unknown pseudo prefix)" in done.stderr
    assert built(tmp_path) == {"avx2", "avx512", "avx512_vnni"}


def test_where_native_kernels_are_required_a_missing_level_is_an_error(tmp_path: Path) -> None:
    done = build(tmp_path, "-mavxvnni", GPTQ_BACKEND_REQUIRE_NATIVE="1")
    assert done.returncode != 0
    assert (
        "RuntimeError: the CPU kernels cannot be built with avx_vnni: the compiler or its assembler does not know "
        "-mavxvnni (g++: error: unrecognized command-line option '-mavxvnni')" in done.stderr
    )
    assert build(tmp_path, GPTQ_BACKEND_REQUIRE_NATIVE="1").returncode == 0
