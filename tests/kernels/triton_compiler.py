"""Which machine code would Triton launch on a GPU that is not here?"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from gptq_backend.kernels.triton import programs

TARGETS = {
    "sm_80": ("cuda", 80, 32),
    "sm_90": ("cuda", 90, 32),
    "gfx942": ("hip", "gfx942", 64),
    "gfx1100": ("hip", "gfx1100", 32),
    "gfx1201": ("hip", "gfx1201", 32),
}
TYPES = {torch.float16: "fp16", torch.bfloat16: "bf16", torch.float32: "fp32", torch.int32: "i32", torch.uint8: "u8"}


class Compiler:
    """Stands in for the module of kernels: compiles what would be launched, and keeps it by the kernel's name."""

    def __init__(self, target: str, module: Any = programs) -> None:
        self.name, self.target, self.compiled = target, GPUTarget(*TARGETS[target]), {}
        self.kernels = {name: kernel for name, kernel in vars(module).items() if hasattr(kernel, "arg_names")}

    def __getattr__(self, name: str) -> Any:
        return type("Kernel", (), {"__getitem__": lambda _, grid: functools.partial(self.launch, name, grid)})()

    def launch(self, name: str, grid: tuple[int, ...], *arguments: Any, **options: Any) -> None:
        """What happens in the place of a launch."""
        self.compiled[name], _ = self.compile(name, *arguments, **options)

    def compile(
        self, name: str, *arguments: Any, num_warps: int = 4, num_stages: int = 3, **constants: Any
    ) -> tuple[Any, list[Any]]:
        """Triton's result, and the arguments that its kernel takes."""
        kernel = self.kernels[name]
        signature: dict[str, str] = dict.fromkeys(constants, "constexpr")
        attributes, passed = {}, []
        for i, (argument, value) in enumerate(zip(kernel.arg_names, arguments)):
            special = not kernel.params[i].do_not_specialize
            if value is None or (not isinstance(value, Tensor) and value == 1 and special):
                signature[argument], constants[argument] = "constexpr", value  # Triton makes a constant of every 1
                continue
            passed.append(value)
            signature[argument] = f"*{TYPES[value.dtype]}" if isinstance(value, Tensor) else "i32"
            if isinstance(value, Tensor) or (value % 16 == 0 and special):
                attributes[(i,)] = [["tt.divisibility", 16]]
        source = ASTSource(kernel, {key: signature[key] for key in kernel.arg_names}, constants, attributes)
        options = {"num_warps": num_warps, "num_stages": num_stages}
        return triton.compile(source, target=self.target, options=options), passed
