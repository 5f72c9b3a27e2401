"""Every kernel's layout gives the packed weight back bit for bit; repacking needs no device but the CPU."""

from __future__ import annotations

import pytest
import torch

from gptq_backend import Kernel
from gptq_backend.format import encode, read_packed
from gptq_backend.kernels import PreparedWeight, cpu
from gptq_backend.kernels.cuda import operators as cuda
from gptq_backend.kernels.triton import operators as triton
from tests.format.test_stored_tensors import random_weight
from tests.kernels.checks import assert_same_packed, native, packed

LAYOUTS = [
    pytest.param(cpu.KERNEL, marks=native, id="cpu"),
    pytest.param(cuda.KERNEL, id="cuda"),
    pytest.param(triton.KERNEL, id="triton"),
]


@pytest.mark.parametrize("kernel", LAYOUTS)
@pytest.mark.parametrize("word_dtype", [torch.int8, torch.int16, torch.int32, torch.int64])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("act_order", [False, True])
def test_repacking_is_undone_bit_for_bit(kernel: Kernel, word_dtype: torch.dtype, bits: int, act_order: bool) -> None:
    for columns, outputs, size in [(128, 32, 32), (100, 24, 20), (64, 17, 64), (4, 1, 4)]:
        weight = random_weight(bits, columns, outputs, size, act_order=act_order)
        given = read_packed(*encode(weight, "gptq", word_dtype), "layer")
        assert_same_packed(PreparedWeight.of(given, kernel).unprepare(), given)


@pytest.mark.parametrize("kernel", LAYOUTS)
def test_bits_that_fill_the_last_word_survive(kernel: Kernel) -> None:
    """50 channels of 4 bits leave half a word over; whatever is in it comes back."""
    given = packed(random_weight(4, 50, 24, 16))
    given.qweight[-1] |= 0x7F << 24
    assert_same_packed(PreparedWeight.of(given, kernel).unprepare(), given)
