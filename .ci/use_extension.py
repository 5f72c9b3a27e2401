"""Load the extensions of the installed wheel, without torch, and let each do something small."""

import ctypes
import importlib.util
import sysconfig
from pathlib import Path


def extension(name):
    """The module gptq_backend.NAME."""
    file = Path(sysconfig.get_path("platlib"), "gptq_backend", f"{name}.abi3.so")
    spec = importlib.util.spec_from_file_location(f"gptq_backend.{name}", file)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# 0 ... 7 scaled by their root mean square
cpu = extension("_cpu")
assert cpu.level() in cpu.levels()
x = (ctypes.c_float * 8)(*range(8))
norm = cpu.Norm(0, 0, 0, 1e-6, 0.0, False, 0)
cpu.rotate(0, 1, 8, ctypes.addressof(x), 1, norm, 0, 0, 0, 1, 0, 0, 1)
root = (sum(i * i for i in range(8)) / 8) ** 0.5
assert all(abs(value - i / root) < 1e-5 for i, value in enumerate(x)), list(x)
try:
    extension("_cuda").open_driver("no such driver")
    raise AssertionError("a driver was found")
except RuntimeError:
    pass
