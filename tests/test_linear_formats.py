"""A prepared layer gives its checkpoint back bit for bit, whatever stored it and whichever kernel has it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given, reject
from hypothesis import strategies as st

from gptq_backend import KERNELS, QuantizedWeight, QuantLinear, WeightSpec
from gptq_backend.format import StoredSpec, encode
from tests.format.test_stored_tensors import random_weight

CPU = torch.device("cpu")
SERVING = [
    row.name
    for row in KERNELS
    if any(row.supports(WeightSpec(64, 64, bits, 64, 1), CPU) is None for bits in (2, 3, 4, 8))
]


@pytest.mark.parametrize("backend", SERVING)
@given(
    bits=st.sampled_from([2, 3, 4, 5, 6, 7, 8]),
    columns=st.integers(1, 200),
    outputs=st.integers(1, 70),
    size=st.sampled_from([1, 16, 32, 48, 128, 200]),
    checkpoint_format=st.sampled_from(["gptq", "gptq_v2", "gptq_p"]),
    word_dtype=st.sampled_from([torch.int8, torch.int16, torch.int32, torch.int64]),
    index_dtype=st.sampled_from([torch.int32, torch.int64]),
    scales_dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32]),
    sym=st.booleans(),
    act_order=st.booleans(),
    filled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_the_state_dict_of_a_prepared_layer_is_the_checkpoint(
    backend, bits, columns, outputs, size, checkpoint_format, word_dtype, index_dtype, scales_dtype, sym, act_order,
    filled, seed,
) -> None:  # fmt: skip
    torch.manual_seed(seed)
    checkpoint_format = "gptq_p" if bits in (5, 6, 7) else checkpoint_format
    if checkpoint_format == "gptq_p" and bits in (3, 5, 6, 7):  # planes hold whole runs of 32
        columns, outputs = columns // 32 * 32 + 32, outputs // 32 * 32 + 32
    weight = random_weight(bits, columns, outputs, min(size, columns), sym=sym, act_order=act_order)
    weight = QuantizedWeight(weight.codes, weight.scales.to(scales_dtype), weight.zeros, weight.g_idx, bits)
    spec, tensors = encode(weight, checkpoint_format, word_dtype)
    spec = dataclasses.replace(spec, g_idx_dtype=index_dtype)
    tensors["g_idx"] = tensors["g_idx"].to(index_dtype)
    used = columns * bits % (word_dtype.itemsize * 8)
    if filled and used:  # what lies behind the last code
        tensors["qweight"][-1] |= torch.tensor(-1, dtype=word_dtype) << used
    layer = QuantLinear(spec, backend=backend)
    layer.load_state_dict(tensors)
    if next(kernel for kernel in KERNELS if kernel.name == backend).supports(spec.weight, CPU) is not None:
        reject()
    found = layer.prepare().state_dict()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    torch.testing.assert_close(layer.dequantize(torch.float32).weight, weight.dequantize())


@pytest.mark.parametrize("backend", ["reference", None])
@pytest.mark.parametrize("columns", [40, 48, 90])
def test_planes_that_end_within_a_run_come_back_bit_for_bit(backend, columns) -> None:
    spec = StoredSpec(columns, 32, 3, columns, groups=1, sym=False, zero_offset=0, planar=True, has_g_idx=False)
    tensors = {
        key: torch.randint(-(2**31), 2**31, shape, dtype=torch.int32) if "q" in key else torch.rand(shape).half()
        for key, shape in spec.shapes.items()
    }
    layer = QuantLinear(spec, backend=backend)
    layer.load_state_dict(tensors)
    found = layer.prepare().state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
