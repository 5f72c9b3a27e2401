"""Builds the native kernels (everything else is in pyproject.toml).

They include no torch header and need no torch here. Without a compiler the installation succeeds, says so, and slower
kernels serve; one that lacks instructions builds what it can. GPTQ_BACKEND_REQUIRE_NATIVE=1 makes either an error. For
CUDA only what launches the kernels is built, with the same compiler; cuda/ builds the machine code.
GPTQ_BACKEND_CUDA=0 leaves it out.

GPTQ_BACKEND_REPOSITORY is the address of the source, to which the package's page links; the release
workflow sets it.
"""

import os
import platform
import re
import subprocess
import sysconfig
import tempfile
from pathlib import Path
from typing import NamedTuple

from pybind11.setup_helpers import ParallelCompile
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

BINDING = "csrc/python/binding.h"
COMMON = ["-std=c++17", "-O3", "-g0", "-fvisibility=hidden", "-Wall"]
REQUIRED = os.environ.get("GPTQ_BACKEND_REQUIRE_NATIVE", "0") not in ("", "0")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]


class Level(NamedTuple):
    """A file, level_NAME.cpp: one is chosen at run time, so each has the flags of its instruction set, and no other
    file has them.
    """

    flags: list[str]
    probe: str  # a source with an instruction of the level, which the assembler has to know too


# Slowest first.
X86 = {
    "avx2": Level(AVX2, "__m256i f(__m256i x) { return _mm256_madd_epi16(x, x); }"),
    "avx_vnni": Level([*AVX2, "-mavxvnni"], "__m256i f(__m256i x) { return _mm256_dpbusd_avx_epi32(x, x, x); }"),
    "avx512": Level(AVX512, "__m512i f(__m512i x) { return _mm512_madd_epi16(x, x); }"),
    "avx512_vnni": Level([*AVX512, "-mavx512vnni"], "__m512i f(__m512i x) { return _mm512_dpbusd_epi32(x, x, x); }"),
}
ARM = {
    "neon": Level([], "int8x16_t f(int8x16_t x) { return vaddq_s8(x, x); }"),
    "neon_dotprod": Level(
        ["-march=armv8.2-a+dotprod"], "int32x4_t f(int32x4_t x, int8x16_t y) { return vdotq_s32(x, y, y); }"
    ),
    "neon_i8mm": Level(
        ["-march=armv8.2-a+dotprod+i8mm"],
        "int32x4_t f(int32x4_t x, uint8x16_t y, int8x16_t z) { return vusdotq_s32(x, y, z); }",
    ),
}
# Of what is built for, which _PYTHON_HOST_PLATFORM names where it is another machine.
MACHINE = os.environ.get("_PYTHON_HOST_PLATFORM", platform.machine()).lower().rpartition("-")[2]
SYSTEM = sysconfig.get_platform().partition("-")[0]  # linux, macosx, win
LEVELS = {"x86_64": X86, "amd64": X86, "aarch64": ARM, "arm64": ARM}.get(MACHINE, {})
HEADER = "immintrin.h" if LEVELS is X86 else "arm_neon.h"
SANITIZE = os.environ.get("GPTQ_BACKEND_SANITIZE")  # e.g. address,undefined
EXTRA = ["-g", "-O1", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"] if SANITIZE else []
ADVICE = {
    "macosx": "Install Xcode's command line tools and Homebrew's libomp",
    "win": "Take the wheel for Windows, which is made on Linux (RELEASE.md)",
}.get(SYSTEM, "Install g++ or clang++")
# Without these options pip takes the wheel that it made, without kernels, from its cache.
AGAIN = "then: pip install --no-cache-dir --force-reinstall --no-deps gptq-backend (or its folder)"
LOST = {
    "gptq_backend._cpu": f"on a CPU only its slow plain-torch kernel serves. {ADVICE}, {AGAIN}",
    "gptq_backend._cuda": f"on NVIDIA GPUs Triton serves. {ADVICE}, {AGAIN}",
}


class BuildNative(build_ext):
    """build_ext with flags per file, and with a sentence in place of a traceback where something fails."""

    def build_extension(self, ext) -> None:
        compile_one = self.compiler._compile

        def with_flags(obj, src, ext_, cc_args, extra_postargs, pp_opts):
            level = LEVELS.get(Path(src).stem.removeprefix("level_"))
            compile_one(obj, src, ext_, cc_args, [*extra_postargs, *(level.flags if level else [])], pp_opts)

        try:
            if ext.name == "gptq_backend._cpu":
                self.choose_levels(ext)
            self.compiler._compile = with_flags
            super().build_extension(ext)
            if OPENMP_ROOT and ext.name == "gptq_backend._cpu":
                self.share_openmp(self.get_ext_fullpath_built(ext))
        except Exception as error:
            if REQUIRED:
                raise
            self.warn(
                f"{ext.name} was not built ({error}). gptq_backend works, but {LOST[ext.name]}; "
                "GPTQ_BACKEND_REQUIRE_NATIVE=1 shows the error."
            )
        finally:
            self.compiler._compile = compile_one

    def choose_levels(self, ext) -> None:
        """Let ``ext`` have the levels that the compiler can build, and say which are left out: GCC 10 lacks one.

        Raises:
            RuntimeError: it cannot build all, and that is REQUIRED.
        """
        refused = {}
        if self.complaint("", []) is None:  # a compiler that can do nothing is the business of the build's own error
            for name, level in LEVELS.items():
                line = self.complaint(f"#include <{HEADER}>\n{level.probe}\n", level.flags)
                if line is not None:
                    refused[name] = line
        built = [name for name in LEVELS if name not in refused]
        if refused:
            known = {flag for name in built for flag in LEVELS[name].flags}
            flags = sorted({flag for name in refused for flag in LEVELS[name].flags} - known)
            reason = f"the compiler or its assembler does not know {' '.join(flags)} ({next(iter(refused.values()))})"
            if REQUIRED:
                raise RuntimeError(
                    f"the CPU kernels cannot be built with {', '.join(refused)}: {reason}. Install a newer g++ or "
                    "clang++, or unset GPTQ_BACKEND_REQUIRE_NATIVE to do without"
                )
            self.warn(
                f"the CPU kernels are built without {', '.join(refused)}: {reason}. For all, install a newer g++ or "
                f"clang++, {AGAIN}"
            )
        ext.sources += [f"csrc/cpu/level_{name}.cpp" for name in built]
        ext.define_macros += [("GPTQ_LEVELS", " ".join(f"LEVEL({name})" for name in built))]
        # What was built with other levels is not up to date, whatever the dates of the sources.
        chosen = Path(self.build_temp, "levels.txt")
        if not chosen.exists() or chosen.read_text() != " ".join(built):
            chosen.parent.mkdir(parents=True, exist_ok=True)
            chosen.write_text(" ".join(built))
        ext.depends.append(str(chosen))

    def complaint(self, source: str, flags: list[str]) -> str | None:
        """The last error that the compiler reports for a source; None if it makes an object of it."""
        with tempfile.TemporaryDirectory() as folder, open(Path(folder, "errors"), "w+b") as errors:
            path = Path(folder, "probe.cpp")
            path.write_text(source)
            before = os.dup(2)
            os.dup2(errors.fileno(), 2)  # to which the compiler, a process of its own, writes
            try:
                self.compiler.compile([str(path)], output_dir=folder, extra_postargs=["-std=c++17", *flags])
                return None
            except CompileError as error:
                errors.seek(0)
                lines = [line for line in errors.read().decode(errors="replace").splitlines() if line.strip()]
                return next((line for line in reversed(lines) if "rror:" in line), lines[-1] if lines else str(error))
            finally:
                os.dup2(before, 2)
                os.close(before)

    def share_openmp(self, module: str) -> None:
        """On macOS: let ``module`` take the libomp that torch brings, by a path that holds wherever both are installed.

        Two of them in one process end it with OMP error 15.
        """
        name = subprocess.run(
            ["otool", "-D", f"{OPENMP_ROOT}/lib/libomp.dylib"], capture_output=True, text=True, check=True
        )
        self.spawn(["install_name_tool", "-change", name.stdout.split()[-1], "@rpath/libomp.dylib", module])

    def copy_extensions_to_source(self) -> None:
        """For editable installations; a module that was not built is not there to be copied.

        One that an earlier version left under the name of a single Python would be imported in place of the new one.
        """
        self.extensions = [ext for ext in self.extensions if os.path.exists(self.get_ext_fullpath_built(ext))]
        for ext in self.extensions:
            for old in Path(*ext.name.split(".")[:-1]).glob(f"{ext.name.rpartition('.')[2]}.cpython-*"):
                old.unlink()
        super().copy_extensions_to_source()

    def get_ext_filename(self, fullname) -> str:
        """Of what is built for, be it another system."""
        return os.path.join(*fullname.split(".")) + TOOLCHAIN.suffix

    def get_ext_fullpath_built(self, ext) -> str:
        """Where build_extension put ``ext``."""
        return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))


# -- OpenMP ------------------------------------------------------------------------------------------------------------


def openmp_root() -> str | None:
    """Where Homebrew keeps libomp, if Apple's clang++ is the compiler: it has no OpenMP of its own."""
    if SYSTEM != "macosx" or "g++" in os.environ.get("CXX", "").replace("clang++", ""):
        return None
    try:
        return subprocess.run(["brew", "--prefix", "libomp"], capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


OPENMP_ROOT = openmp_root()


class Toolchain(NamedTuple):
    """What the compilers for a system need beyond COMMON for the CPU kernels, and how it names an extension."""

    compile: list[str]
    link: list[str]
    suffix: str = ".abi3.so"


GNU = Toolchain(["-fopenmp"], ["-fopenmp"])
# Apple's clang++, with the header of Homebrew's OpenMP and the library that torch brings.
APPLE = Toolchain(
    ["-Xpreprocessor", "-fopenmp", f"-I{OPENMP_ROOT}/include"],
    [f"{OPENMP_ROOT}/lib/libomp.dylib", "-Wl,-rpath,@loader_path/../torch/lib"],
)
# clang++ of zig, which brings the headers and libraries of Windows; csrc/windows has what it lacks.
WINDOWS = Toolchain(
    ["-fopenmp", "-Icsrc/windows", "-include", "csrc/windows/pyconfig.h"], ["-lpython3", "-liomp5md"], ".pyd"
)
TOOLCHAIN = WINDOWS if SYSTEM == "win" else APPLE if OPENMP_ROOT else GNU
if SYSTEM == "macosx":
    # A Python for both kinds of Mac would compile each file for both, and a level fits only one.
    os.environ.setdefault("ARCHFLAGS", f"-arch {MACHINE}")


def cuda_extensions() -> list[Extension]:
    """What launches the CUDA kernels, or nothing. It needs nothing of CUDA: the driver is looked up at run time."""
    if os.environ.get("GPTQ_BACKEND_CUDA") == "0" or SYSTEM != "linux":
        return []
    folder, device = Path("csrc/cuda"), Path("gptq_backend/kernels/cuda/device")
    return [
        Extension(
            "gptq_backend._cuda",
            [str(path) for path in sorted(folder.glob("*.cpp"))],
            depends=[BINDING, *(str(path) for path in sorted(folder.glob("*.h"))), str(device / "arguments.h")],
            include_dirs=[str(device)],
            py_limited_api=True,
            extra_compile_args=COMMON,
            libraries=["dl"],
        )
    ]


# -- the page of the package -------------------------------------------------------------------------------------------

REPOSITORY = os.environ.get("GPTQ_BACKEND_REPOSITORY", "").rstrip("/")


def long_description() -> str:
    """README.md with links that work where there is no file beside it: into the repository, or else none."""
    version = re.search(r'__version__ = "(.*)"', Path("gptq_backend/version.py").read_text())[1]
    link = rf"[\1]({REPOSITORY}/blob/v{version}/\2)" if REPOSITORY else r"\1"
    return re.sub(r"\[([^]]*)\]\((?!https?:|#)([^)]*)\)", link, Path("README.md").read_text(encoding="utf-8"))


PAGES = {"Source": "", "Documentation": "/blob/HEAD/docs/quickstart.md", "Changelog": "/blob/HEAD/CHANGELOG.md"}


PORTABLE = [
    "module.cpp",
    "block_module.cpp",
    "block.cpp",
    "dense.cpp",
    "experts.cpp",
    "gemm.cpp",
    "gradient.cpp",
    "layer_halves.cpp",
    "layers.cpp",
    "lookup.cpp",
    "places_module.cpp",
    "platform.cpp",
    "repack.cpp",
    "router.cpp",
    "tail.cpp",
    "team.cpp",
    "torch_abi.cpp",
    "torch_op.cpp",
    "level_generic.cpp",
]
cpu = Extension(
    "gptq_backend._cpu",
    [f"csrc/cpu/{name}" for name in PORTABLE],  # and levels: choose_levels
    depends=[BINDING, *(str(path) for path in sorted(Path("csrc/cpu").glob("*.h")))],
    py_limited_api=True,
    extra_compile_args=[*COMMON, *TOOLCHAIN.compile, "-fno-math-errno", "-Wno-psabi", *EXTRA],
    extra_link_args=[*TOOLCHAIN.link, *EXTRA],
)
ParallelCompile(default=os.cpu_count()).install()
# One wheel for every Python from 3.10 on: csrc/python/binding.h keeps to its stable ABI.
setup(
    ext_modules=[cpu, *cuda_extensions()],
    long_description=long_description(),
    long_description_content_type="text/markdown",
    project_urls={name: REPOSITORY + path for name, path in PAGES.items()} if REPOSITORY else {},
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}},
)
