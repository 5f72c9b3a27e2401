"""The machine code of the CUDA kernels: compiled by NVRTC as users get it, disassembled, packed and kept."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import shutil
import stat
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from gptq_backend.kernels.cuda import machine_code, nvrtc
from gptq_backend.kernels.cuda.nvrtc import CompileError, Compiler
from tests.kernels.emulator import Emulator

ROOT = Path(__file__).parents[2]
WIDTHS = (2, 3, 4, 8)
EVERY = [(arch, bits) for arch in (75, 80, 86, 89, 90, 100, 120) for bits in WIDTHS]
FEW = [(80, 4), (90, 3)]
FEW_AND_SLOW = [
    pytest.param(*each, marks=() if each in FEW else [pytest.mark.slow, pytest.mark.timeout(600)]) for each in EVERY
]


@pytest.fixture(scope="session")
def cubins(compiler: Compiler) -> dict[tuple[int, int], bytes]:
    """What was compiled already, by architecture and bits."""
    return {}


@pytest.fixture
def cubin(request: pytest.FixtureRequest, compiler: Compiler, cubins: dict[tuple[int, int], bytes]) -> bytes:
    """The machine code for the test's ``arch`` and ``bits``."""
    key = request.getfixturevalue("arch"), request.getfixturevalue("bits")
    if key not in cubins:
        if key[0] not in compiler.architectures:
            pytest.skip(f"{compiler} does not know this architecture")
        cubins[key] = compiler.compile(key[1], f"sm_{key[0]}")
    return cubins[key]


def cuobjdump() -> str:
    """The tool of a CUDA toolkit or of triton."""
    triton = importlib.util.find_spec("triton")
    beside = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else None
    if not (tool := shutil.which("cuobjdump") or (beside and shutil.which("cuobjdump", path=str(beside)))):
        pytest.skip("no cuobjdump: neither a full CUDA toolkit nor triton is installed")
    return tool


def dump(cubin: bytes, what: str, folder: Path) -> str:
    (folder / "cubin").write_bytes(cubin)
    command = [cuobjdump(), what, str(folder / "cubin")]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def disassembled(cubin: bytes, folder: Path) -> dict[str, str]:
    """{kernel: its resource usage and SASS}."""
    code = dict(
        re.findall(r"Function : (\S+)(.*?)(?=\n\s*Function : |\Z)", dump(cubin, "--dump-sass", folder), re.DOTALL)
    )
    usage = dict(re.findall(r"Function (\S+):\n\s*(.*)", dump(cubin, "--dump-resource-usage", folder)))
    return {name: usage[name] + "\n" + text for name, text in code.items()}


def argument_sizes(cubin: bytes) -> dict[str, list[int]]:
    """{kernel: bytes of each argument}, from the sections .nv.info.KERNEL of the ELF file."""
    first, (size, count, names_index) = struct.unpack_from("<Q", cubin, 40)[0], struct.unpack_from("<HHH", cubin, 58)
    heads = [struct.unpack_from("<IIQQQQ", cubin, first + i * size) for i in range(count)]
    names = heads[names_index][4]
    found: dict[str, list[int]] = {}
    for name_at, *_, at, length in heads:
        name = cubin[names + name_at :].partition(b"\0")[0].decode()
        if not name.startswith(".nv.info.gptq"):
            continue
        sizes, end = {}, at + length
        while at < end:  # attributes: format, number, 16 bits that are a value or the size of one that follows
            form, number, value = struct.unpack_from("<BBH", cubin, at)
            if form == 4 and number == 0x17:  # EIATTR_KPARAM_INFO: index, ordinal, offset, and the size in high bits
                _, ordinal, _, bits = struct.unpack_from("<IHHI", cubin, at + 4)
                sizes[ordinal] = bits >> 18
            at += 4 + (value if form == 4 else 0)
        found[name.removeprefix(".nv.info.")] = [sizes[ordinal] for ordinal in sorted(sizes)]
    return found


# -- what the compiler makes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "bits"), FEW_AND_SLOW)
def test_every_kernel_is_there_and_takes_what_the_host_passes(
    arch: int, bits: int, cubin: bytes, emulator: Emulator
) -> None:
    """The host's compiler gives the same arguments the same sizes; what is passed there is in test_cuda.py."""
    expected = {name: sizes for name, sizes in emulator.kernels.items() if f"_{bits}_{name.split('_')[-1]}" in name}
    assert len(expected) == 21
    assert argument_sizes(cubin) == expected


@pytest.mark.parametrize(("arch", "bits"), FEW_AND_SLOW)
def test_no_kernel_spills_and_blocks_find_their_registers(arch: int, bits: int, cubin: bytes, tmp_path: Path) -> None:
    """A multiprocessor has 65536; plans give the smallest skinny kernel up to 16 warps, all others 8."""
    found = disassembled(cubin, tmp_path)
    assert len(found) == 21
    for name, code in found.items():
        assert re.search(r"STACK:0 .*LOCAL:0 ", code), (name, code.partition("\n")[0])
        assert not re.search(r"\b(LDL|STL)\b", code), name
        registers = re.search(r"REG:(\d+)", code)
        assert registers
        assert int(registers[1]) * 32 * (16 if "skinny_1_1" in name else 8) <= 65536, name


@pytest.mark.parametrize(("arch", "bits"), FEW_AND_SLOW)
def test_weights_arrive_in_wide_loads_and_meet_matrix_units(arch: int, bits: int, cubin: bytes, tmp_path: Path) -> None:
    """Loads of 16 bytes per lane for 4 and 8 bits, of 8 for 2 and 3; the wide kernel copies 16 at a time."""
    for name, code in disassembled(cubin, tmp_path).items():
        if not name.startswith(("gptq_skinny", "gptq_wide")):
            continue
        if arch == 75:
            assert "HMMA.1688.F32" in code or name.endswith("bf16")
            continue
        assert ("HMMA.16816.F32.BF16" if name.endswith("bf16") else "HMMA.16816.F32 ") in code, name
        if "wide" in name:
            assert re.search(r"LDGSTS\.E\S*\.128", code), name
            assert "LDS.128" in code
        else:
            assert re.search(rf"LDG\.E\.(NA\.)?\S*{128 if bits in (4, 8) else 64}\S*", code), name


def test_a_failure_ends_with_the_compilers_words(compiler: Compiler) -> None:
    with pytest.raises(CompileError, match=rf"{compiler} cannot compile the CUDA kernels for sm_1: .*architecture"):
        compiler.compile(4, "sm_1")


def test_no_compiler_is_a_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(CompileError, match=r"NVRTC cannot be loaded \(.*No such file"):
        Compiler(str(tmp_path / "libnvrtc.so.12"))
    monkeypatch.setattr(nvrtc, "_candidates", lambda major: iter([str(tmp_path / "libnvrtc.so.12")]))
    for version, words in (("12.8", r"12 was found.*nvidia-cuda-nvrtc-cu12$"), ("13.0", r"13 .*nvidia-cuda-nvrtc$")):
        with pytest.raises(CompileError, match=r"no libnvrtc\.so\." + words):
            nvrtc.find_compiler(version)


def test_torchs_own_folder_comes_before_nvidias_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Wheels of torch for ARM have libnvrtc.so.12 in torch/lib."""
    found = [tmp_path / name for name in ("torch/lib/libnvrtc.so.12", "nvidia/cuda_nvrtc/lib/libnvrtc.so.12")]
    others = [tmp_path / "torch/lib/libnvrtc-builtins.so.12.8", tmp_path / "nvidia/cu13/lib/libnvrtc.so.13"]
    for path in (*found, *others):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    monkeypatch.setattr(nvrtc, "_package_folders", lambda name: [tmp_path / name])
    assert list(nvrtc._candidates("12"))[:2] == [str(path) for path in found]
    assert next(nvrtc._candidates("13")) == str(others[1])


def test_a_compiler_of_before_cuda_11_2_is_passed_over(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    if not (host := shutil.which("g++") or shutil.which("clang++")):
        pytest.skip("no C++ compiler")
    old = tmp_path / "libnvrtc.so.11.0"
    source = """extern "C" const char* nvrtcGetErrorString(int) { return "an error"; }
    extern "C" int nvrtcVersion(int* major, int* minor) { *major = 11, *minor = 0; return 0; }"""
    subprocess.run([host, "-shared", "-fPIC", "-x", "c++", "-", "-o", str(old)], input=source, text=True, check=True)
    with pytest.raises(CompileError, match=r"NVRTC has no nvrtcGetNumSupportedArchs; install the one of CUDA 11\.2"):
        Compiler(str(old))
    monkeypatch.setattr(nvrtc, "_candidates", lambda major: iter([str(old)]))
    with pytest.raises(CompileError, match=r"no libnvrtc\.so\.11 was found"):
        nvrtc.find_compiler("11.8")


# -- the cache ---------------------------------------------------------------------------------------------------------


class Counting:
    """A compiler that is quick."""

    architectures = (75, 80, 86, 90)

    def __init__(self) -> None:
        self.asked: list[tuple[int, str]] = []

    def __str__(self) -> str:
        return "NVRTC 1.0"

    def compile(self, bits: int, target: str) -> bytes:
        self.asked.append((bits, target))
        return f"{target}-{bits}".encode()


@pytest.fixture
def counting(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Counting:
    quick = Counting()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(machine_code, "_compiler", lambda: quick)
    return quick


def test_code_is_compiled_once_for_later_processes(counting: Counting, caplog: pytest.LogCaptureFixture) -> None:
    for _ in range(2):
        assert machine_code._compiled(4, 89) == b"sm_86-4"
        assert machine_code._compiled(8, 90) == b"sm_90-8"
    assert counting.asked == [(4, "sm_86"), (8, "sm_90")]
    assert caplog.text.count("compiling the CUDA kernels") == 2
    folder = machine_code.cache_folder()
    assert len(list(folder.iterdir())) == 2
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert {stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()} == {0o600}


def test_other_sources_or_another_compiler_compile_anew(counting: Counting, monkeypatch: pytest.MonkeyPatch) -> None:
    machine_code._compiled(4, 80)
    monkeypatch.setattr(machine_code, "source_hash", lambda: "other")
    machine_code._compiled(4, 80)
    monkeypatch.setattr(Counting, "__str__", lambda self: "NVRTC 2.0")
    machine_code._compiled(4, 80)
    assert len(counting.asked) == 3


@pytest.mark.parametrize("damage", ["cut", "changed", "empty", "writable by others"])
def test_a_damaged_file_is_compiled_again(counting: Counting, damage: str) -> None:
    machine_code._compiled(4, 80)
    (path,) = machine_code.cache_folder().iterdir()
    whole = path.read_bytes()
    if damage == "writable by others":
        path.chmod(0o666)
    else:
        path.write_bytes({"cut": whole[:-1], "changed": whole[:-1] + b"?", "empty": b""}[damage])
    for _ in range(2):
        assert machine_code._compiled(4, 80) == b"sm_80-4"
    assert len(counting.asked) == 2
    assert path.read_bytes() == whole


def test_a_folder_that_cannot_be_written_costs_only_the_next_process(
    counting: Counting, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "cache").write_text("a file")
    with caplog.at_level(logging.WARNING):
        assert machine_code._compiled(4, 80) == b"sm_80-4"
    assert "the compiled CUDA kernels cannot be kept for the next process (" in caplog.text


@pytest.mark.parametrize("named", ["", "cache"])
def test_without_a_home_nothing_is_written_where_the_process_happens_to_be(
    counting: Counting, named: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", named)
    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", {}.__getitem__)  # as in a container for a number without a name
    assert machine_code._compiled(4, 80) == b"sm_80-4"
    assert not list(tmp_path.iterdir())
    assert "cannot be kept for the next process (this user has no home folder; set XDG_CACHE_HOME" in caplog.text


def test_a_compiler_older_than_the_gpu_is_a_sentence(counting: Counting) -> None:
    with pytest.raises(CompileError, match=r"NVRTC 1\.0 knows no architecture of compute capability 12"):
        machine_code._compiled(4, 120)


# -- the package gptq-backend-cuda -------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_the_package_holds_what_it_says(compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if compiler.version[0] != 12:
        pytest.skip("the package is compiled by the NVRTC of CUDA 12")
    folder = tmp_path / "gptq_backend_cuda"
    folder.mkdir()
    stale = folder / "sm_75-4.xz"
    stale.touch()
    subprocess.run(
        [sys.executable, "setup.py", "build", "--build-base", str(tmp_path / "build"), "--build-lib", str(tmp_path)],
        env=os.environ | {"GPTQ_BACKEND_CUDA_ARCHS": "86"},
        check=True,
        cwd=ROOT / "cuda",
    )
    assert not stale.exists()
    assert (folder / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    contents = json.loads((folder / "contents.json").read_text())
    assert contents == {
        "cuda": str(compiler).partition(" ")[2],
        "cubins": [86],
        "ptx": 80,
        "sources": nvrtc.source_hash(),
    }
    monkeypatch.syspath_prepend(str(tmp_path))
    machine_code._shipped.cache_clear()
    shipped = machine_code._shipped()
    machine_code._shipped.cache_clear()
    for bits in WIDTHS:
        assert "sm_86.cubin" in dump(shipped.read("sm_86", bits), "--list-elf", tmp_path)
        ptx = shipped.read("compute_80", bits)
        assert ptx.endswith(b"\0")
        assert b".target sm_80" in ptx
        assert len(re.findall(rb"\.entry gptq_\w+", ptx)) == 21


def test_the_package_alone_says_what_it_is_built_from(tmp_path: Path) -> None:
    shutil.copytree(ROOT / "cuda", tmp_path / "cuda", ignore=shutil.ignore_patterns("build", "*.egg-info"))
    done = subprocess.run([sys.executable, "setup.py", "build"], capture_output=True, text=True, cwd=tmp_path / "cuda")
    assert done.returncode
    assert "build gptq-backend-cuda inside a checkout: pip wheel --no-deps cuda" in done.stderr
    assert "Traceback" not in done.stderr
