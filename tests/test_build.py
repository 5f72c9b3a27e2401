"""What setup.py builds with compilers that know less than the newest ones."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from gptq_backend.kernels import cpu

ROOT = Path(__file__).parents[1]
# Optimizing would take minutes, and what is tested are the flags.
OLD_COMPILER = """#!/bin/sh
for each in "$@"; do
    shift
    case "$each" in
        REFUSED) echo "g++: error: unrecognized command-line option '$each'" >&2; exit 1 ;;
        -O3) set -- "$@" -O0 ;;
        *) set -- "$@" "$each" ;;
    esac
done
exec g++ "$@"
"""


@pytest.mark.timeout(900)  # seconds, where nothing else runs
@pytest.mark.skipif(platform.machine() != "x86_64" or sys.platform != "linux", reason="refuses flags of x86-64")
@pytest.mark.skipif(cpu._cpu is None, reason="without a compiler nothing is built")
def test_an_old_compiler_builds_the_levels_that_it_can(tmp_path: Path) -> None:
    pytest.importorskip("pybind11", reason="the build imports it; it is part of the test extra")
    compiler = tmp_path / "old-g++"
    compiler.write_text(OLD_COMPILER.replace("REFUSED", "-mavxvnni|-mavx512*"))
    compiler.chmod(0o755)
    done = subprocess.run(
        [sys.executable, "setup.py", "build_ext", "--build-lib", str(tmp_path), "--build-temp", str(tmp_path / "temp")],
        env=os.environ
        | {"CC": str(compiler), "CXX": str(compiler), "GPTQ_BACKEND_REQUIRE_NATIVE": "1", "GPTQ_BACKEND_CUDA": "0"},
        capture_output=True,
        text=True,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    assert "the CPU kernels are built without avx_vnni, avx512, avx512_vnni" in done.stderr
    assert "does not know -mavx512bw, -mavx512dq, -mavx512f, -mavx512vl, -mavx512vnni, -mavxvnni" in done.stderr
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
