"""How the launches of the Triton kernels become runs of the PTX that Triton makes for sm_80."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tests.kernels.ptx.machine import Machine
from tests.kernels.triton_compiler import Compiler


class Launcher(Compiler):
    """Stands in for the module of kernels: compiles each and runs it on the machine.

    Args:
        edit: of the PTX, given a kernel's name.

    Attributes:
        launched: names of kernels, in the order of their launches.
    """

    def __init__(self, machine: Machine, edit: Callable[[str, str], str] = lambda name, ptx: ptx) -> None:
        super().__init__("sm_80")
        self._machine, self._edit = machine, edit
        self.launched: list[str] = []

    def launch(self, name: str, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        compiled, passed = self.compile(name, *arguments, **options)
        self.compiled[name] = compiled
        self._machine.load(self._edit(name, compiled.asm["ptx"]))
        workspaces = (0, 0)  # of the whole grid and of a profiler: Triton passes null where there is none
        threads = compiled.metadata.num_warps * 32
        self._machine.launch(name, grid, threads, compiled.metadata.shared, (*passed, *workspaces))
        self.launched.append(name)
