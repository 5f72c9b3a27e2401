"""Load the CPU extension of the installed wheel, without torch, and let it scale 0 ... 7 by their root mean square."""

import ctypes
import importlib.util
import sysconfig
from pathlib import Path

file = Path(sysconfig.get_path("platlib"), "gptq_backend", "_cpu.abi3.so")
spec = importlib.util.spec_from_file_location("gptq_backend._cpu", file)
assert spec is not None
assert spec.loader is not None
cpu = importlib.util.module_from_spec(spec)
spec.loader.exec_module(cpu)
assert cpu.level() in cpu.levels()
x = (ctypes.c_float * 8)(*range(8))
norm = cpu.Norm(0, 0, 0, 1e-6, 0.0, False, 0)
cpu.rotate(0, 1, 8, ctypes.addressof(x), 1, norm, 0, 0, 0, 1, 0, 0, 1)
root = (sum(i * i for i in range(8)) / 8) ** 0.5
assert all(abs(value - i / root) < 1e-5 for i, value in enumerate(x)), list(x)
