"""Builds the native kernels (everything else is in pyproject.toml).

They include no torch header and need no torch here. Without a compiler the installation succeeds, says so, and the
plain-torch kernel serves; GPTQ_BACKEND_REQUIRE_NATIVE=1 makes that an error.
"""

import os
import platform

from pybind11.setup_helpers import ParallelCompile, Pybind11Extension
from setuptools import setup
from setuptools.command.build_ext import build_ext

REQUIRED = os.environ.get("GPTQ_BACKEND_REQUIRE_NATIVE", "0") not in ("", "0")
X86 = platform.machine().lower() in ("x86_64", "amd64")
AVX2 = ["-mavx2", "-mfma", "-mf16c"]
AVX512 = [*AVX2, "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mprefer-vector-width=512"]
# A level per file, chosen at run time: each has the flags of its instruction set, and no other file has them.
LEVELS = {
    "level_avx2.cpp": AVX2,
    "level_avx_vnni.cpp": [*AVX2, "-mavxvnni"],
    "level_avx512.cpp": AVX512,
    "level_avx512_vnni.cpp": [*AVX512, "-mavx512vnni"],
}
SANITIZE = os.environ.get("GPTQ_BACKEND_SANITIZE")  # e.g. address,undefined
EXTRA = ["-g", "-O1", f"-fsanitize={SANITIZE}", "-fno-sanitize-recover=all"] if SANITIZE else []


class BuildLevels(build_ext):
    """build_ext with flags per file, and with a sentence in place of a traceback where nothing can be compiled."""

    def build_extension(self, ext) -> None:
        compile_one = self.compiler._compile

        def with_flags(obj, src, ext_, cc_args, extra_postargs, pp_opts):
            compile_one(obj, src, ext_, cc_args, [*extra_postargs, *LEVELS.get(os.path.basename(src), [])], pp_opts)

        self.compiler._compile = with_flags
        try:
            super().build_extension(ext)
        except Exception as error:
            if REQUIRED:
                raise
            self.warn(
                f"{ext.name} was not built ({error}). gptq_backend works, but on a CPU only its slow plain-torch "
                "kernel serves. Install g++ or clang++ and install again; GPTQ_BACKEND_REQUIRE_NATIVE=1 shows the "
                "error."
            )
        finally:
            self.compiler._compile = compile_one

    def copy_extensions_to_source(self) -> None:
        """For editable installations; a module that was not built is not there to be copied."""
        self.extensions = [ext for ext in self.extensions if os.path.exists(self.get_ext_fullpath_built(ext))]
        super().copy_extensions_to_source()

    def get_ext_fullpath_built(self, ext) -> str:
        """Where build_extension put ``ext``."""
        return os.path.join(self.build_lib, self.get_ext_filename(self.get_ext_fullname(ext.name)))


sources = ["module.cpp", "gemm.cpp", "repack.cpp", "level_generic.cpp", *(LEVELS if X86 else [])]
cpu = Pybind11Extension(
    "gptq_backend._cpu",
    [f"csrc/cpu/{name}" for name in sources],
    depends=[f"csrc/cpu/{name}" for name in ("gemm.h", "kernel.h", "kernel_impl.h", "isa_x86.h")],
    cxx_std=17,
    extra_compile_args=["-O3", "-fopenmp", "-fno-math-errno", "-fvisibility=hidden", "-Wall", "-Wno-psabi", *EXTRA],
    extra_link_args=["-fopenmp", *EXTRA],
)
ParallelCompile(default=os.cpu_count()).install()
setup(ext_modules=[cpu], cmdclass={"build_ext": BuildLevels})
