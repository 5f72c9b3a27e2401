"""The machine that runs PTX on the host, against the tensors of a test: every access to memory is checked.

What is checked, and how lanes and warps take turns, is in host/memory.h and host/machine.h.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from tests.kernels.emulator import SOURCES, StandIn, build_library
from tests.kernels.ptx.assemble import AssemblyError, Program, assemble

HOST = Path(__file__).parent / "host"


class Machine(StandIn):
    """A stand-in for the driver whose kernels are those of the PTX that was loaded last.

    Args:
        compiler: for C++20.
        folder: to compile into.
    """

    def __init__(self, compiler: str, folder: Path) -> None:
        sources = [(path, "") for path in (SOURCES / "driver.cpp", *sorted(HOST.glob("*.cpp")))]
        super().__init__(build_library(compiler, folder, sources, "-std=c++20", "-O2", "-ffp-contract=off"))
        self.library.ptx_instruction.restype = ctypes.c_bool
        self.library.ptx_launch.restype = ctypes.c_char_p
        self._programs: dict[str, Program] = {}

    def load(self, ptx: str) -> list[str]:
        """Take the kernels of a module -> their names.

        Raises:
            AssemblyError: the machine lacks an instruction.
        """
        programs = assemble(ptx)
        for name, program in programs.items():
            each = name.encode()
            flat = [number for parameter in program.parameters for number in parameter]
            self.library.ptx_begin(each, program.slots, (ctypes.c_size_t * len(flat))(*flat), len(program.parameters))
            for slot, value in program.constants.items():
                self.library.ptx_constant(each, slot, ctypes.c_uint64(value))
            for i in program.code:
                operands = (ctypes.c_int * len(i.operands))(*i.operands)
                operation, text = i.operation.encode(), i.text.encode()
                known = self.library.ptx_instruction(
                    each, operation, i.guard, i.negated, operands, len(i.operands), text
                )
                if not known:
                    raise AssemblyError(f"{name}: the machine has no {i.operation} (`{i.text}`)")
        self._programs.update(programs)
        return list(programs)

    def launch(
        self, name: str, grid: Sequence[int], threads: int, shared_bytes: int, arguments: Sequence[int | Tensor]
    ) -> None:
        """Run a kernel with these numbers and tensors.

        Raises:
            RuntimeError: it did what it may not do.
        """
        values = [each.data_ptr() if isinstance(each, Tensor) else each for each in arguments]
        sizes = [size for _, size in self._programs[name].parameters]
        assert len(values) == len(sizes), (name, sizes, values)
        words = [value.to_bytes(size, "little", signed=value < 0) for value, size in zip(values, sizes)]
        data = [ctypes.create_string_buffer(word, len(word)) for word in words]
        pointers = (ctypes.c_void_p * len(data))(*(ctypes.addressof(each) for each in data))
        sides = [*grid, 1, 1][:3]
        if problem := self.library.ptx_launch(name.encode(), *sides, threads, ctypes.c_size_t(shared_bytes), pointers):
            raise RuntimeError(problem.decode())

    def executed(self, name: str) -> list[tuple[str, int]]:
        """The instructions of a kernel, and how often a warp has executed each since the kernel was loaded."""
        code = self._programs[name].code
        counts = (ctypes.c_uint64 * len(code))()
        self.library.ptx_executed(name.encode(), counts)
        return [(i.text, count) for i, count in zip(code, counts)]

    def memory(self, *tensors: Tensor | None) -> Memory:
        """What launches may touch inside of the ``with``: these tensors, and those that are made there."""
        return Memory(self, tensors)


class Memory(TorchDispatchMode):
    """See :meth:`Machine.memory`. Nothing is freed before the end, so that no address is used twice."""

    def __init__(self, machine: Machine, tensors: Sequence[Tensor | None]) -> None:
        super().__init__()
        self._machine, self._tensors, self._storages = machine, tensors, {}

    def __enter__(self) -> Memory:
        for tensor in self._tensors:
            self._add(tensor)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._machine.library.ptx_forget_tensors()
        self._storages.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            self._add(each)
        return result

    def _add(self, tensor: Any) -> None:
        if not isinstance(tensor, Tensor) or tensor.device.type != "cpu":
            return
        storage = tensor.untyped_storage()
        if storage.nbytes() and storage.data_ptr() not in self._storages:
            self._storages[storage.data_ptr()] = storage
            self._machine.library.ptx_add_tensor(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()))
