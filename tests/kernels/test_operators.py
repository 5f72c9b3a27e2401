"""Every operator of ours holds what torch.library asks of one: schema, fake, gradients, dispatch."""

from __future__ import annotations

import pytest
import torch

from gptq_backend import KERNELS, Kernel, WeightSpec
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import native, prepared

SERVING = [kernel for kernel in KERNELS if kernel.supports(WeightSpec(90, 33, 4, 30, 3), torch.device("cpu")) is None]
NAMES = ("gemm", "gemm_inference", "dequantize", "gradient", "look_up", "look_up_input")
# Checked in files of their own, or where their devices are, or are emulated.
ELSEWHERE = {
    "cpu_moe_gemm": "tests/kernels/test_experts.py",
    **dict.fromkeys(
        (f"cpu_{half}_layer{which}" for half in ("start", "end") for which in ("", "_inference")),
        "tests/kernels/test_cpu_layer_halves.py",
    ),
    "triton_gemm": "tests/kernels/interpret_triton.py",
    "triton_gemm_inference": "tests/kernels/interpret_triton.py",
    "triton_dequantize": "tests/kernels/interpret_triton.py",
    "triton_look_up": "tests/kernels/test_look_up.py",
    "triton_moe_gemm": "tests/kernels/interpret_triton.py",
    "cuda_gemm": "tests/gpu/test_cuda.py",
    "cuda_gemm_inference": "tests/gpu/test_cuda.py",
    "cuda_dequantize": "tests/gpu/test_cuda.py",
    "cuda_look_up": "tests/kernels/test_look_up.py",
}


def prefix(kernel: Kernel) -> str:
    return kernel.dequantize.__name__.removesuffix("dequantize")


@pytest.mark.parametrize("kernel", SERVING, ids=lambda kernel: kernel.name)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("act_order", [True, False])
def test_operators_pass_opcheck(kernel: Kernel, sym: bool, act_order: bool) -> None:
    served = prepared(random_weight(4, 90, 33, 30, act_order=act_order, sym=sym), kernel)
    layout = kernel.layout.arguments(served.spec, served.tensors)
    operators = torch.ops.gptq_backend
    for bias in (torch.randn(33, requires_grad=True), None):
        x = torch.randn(2, 1, 90, requires_grad=True)
        torch.library.opcheck(getattr(operators, f"{prefix(kernel)}gemm").default, (x, *layout, bias))
    inference = getattr(operators, f"{prefix(kernel)}gemm_inference").default
    torch.library.opcheck(inference, (torch.randn(5, 90), *layout, torch.randn(33)))
    for dtype in (torch.float32, torch.bfloat16):
        torch.library.opcheck(getattr(operators, f"{prefix(kernel)}dequantize").default, (*layout, dtype))
    for name, rows in (("look_up", 33), ("look_up_input", 90)):
        if hasattr(operators, f"{prefix(kernel)}{name}"):
            ids = torch.randint(rows, (2, 3))
            torch.library.opcheck(getattr(operators, f"{prefix(kernel)}{name}").default, (ids, *layout, torch.bfloat16))
    if hasattr(operators, f"{prefix(kernel)}gradient"):
        y_grad = torch.randn(2, 1, 33, requires_grad=True)
        torch.library.opcheck(getattr(operators, f"{prefix(kernel)}gradient").default, (y_grad, *layout))


@native
def test_no_operator_goes_unchecked() -> None:
    names = {name.partition("::")[2] for name in torch._C._dispatch_get_all_op_names() if name.startswith("gptq_back")}
    checked = {f"{prefix(row)}{name}" for row in SERVING for name in NAMES}
    assert names <= checked | set(ELSEWHERE)
