"""Compiles the CUDA kernels of the checkout around this folder, for a wheel that has them and nothing else.

    pip wheel --no-deps cuda          (in the checkout; no GPU, toolkit or driver is needed)

GPTQ_BACKEND_CUDA_ARCHS names the architectures, e.g. "80;90"; by default all in ARCHITECTURES.
"""

import importlib.util
import json
import lzma
import os
import re
import runpy
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parents[1]
CORE = ROOT / "gptq_backend"
if not CORE.exists():
    raise SystemExit(f"{CORE} is not there; build gptq-backend-cuda inside a checkout: pip wheel --no-deps cuda")
# 10.3 runs the code for 10.0, and 12.1 that for 12.0. Jetsons of 8.7 are offered that for 8.6, and may refuse it.
ARCHITECTURES = (75, 80, 86, 89, 90, 100, 120)
PTX = 80  # for GPUs that came later
BITS = (2, 3, 4, 8)


def compiler_module():
    """The file of gptq_backend that finds and calls NVRTC, without the rest, which needs torch."""
    spec = importlib.util.spec_from_file_location("nvrtc", CORE / "kernels" / "cuda" / "nvrtc.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def write_machine_code(folder: Path) -> None:
    """All files of the package but ``__init__.py``."""
    nvrtc = compiler_module()
    compiler = nvrtc.find_compiler("12")
    asked = re.findall(r"\d+", os.environ.get("GPTQ_BACKEND_CUDA_ARCHS", "").replace(".", ""))
    cubins = [int(arch) for arch in asked] or list(ARCHITECTURES)
    for arch in cubins:
        if arch not in compiler.architectures:
            raise SystemExit(f"{compiler} knows no architecture {arch}, only {compiler.architectures}")

    def write(target: str, bits: int) -> None:
        code = compiler.compile(bits, target)
        packed = lzma.compress(code, preset=9 | lzma.PRESET_EXTREME)
        (folder / f"{target}-{bits}.xz").write_bytes(packed)
        print(f"{target}, {bits} bits: {len(code)} bytes, {len(packed)} packed", flush=True)

    jobs = [(target, bits) for target in (*(f"sm_{arch}" for arch in cubins), f"compute_{PTX}") for bits in BITS]
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda job: write(*job), jobs))
    contents = {
        "cuda": ".".join(map(str, compiler.version)),
        "cubins": cubins,
        "ptx": PTX,
        "sources": nvrtc.source_hash(),
    }
    (folder / "contents.json").write_text(json.dumps(contents) + "\n", encoding="utf-8")


class BuildMachineCode(build_py):
    """build_py, and then the compiler."""

    def run(self) -> None:
        super().run()
        folder = Path(self.build_lib) / "gptq_backend_cuda"
        self.mkpath(str(folder))
        for old in folder.glob("*.xz"):  # of an earlier build, perhaps for other architectures
            old.unlink()
        self.copy_file(str(ROOT / "LICENSE"), str(folder))
        write_machine_code(folder)


setup(
    version=runpy.run_path(str(CORE / "version.py"))["__version__"],
    cmdclass={"build_py": BuildMachineCode},
)
