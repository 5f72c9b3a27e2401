"""A prepared layer gives its checkpoint back bit for bit, whatever stored it and whichever kernel has it."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptq_backend import KERNELS, QuantizedWeight, QuantLinear
from gptq_backend.format import encode
from tests.format.test_weight import random_weight

CPU = torch.device("cpu")


@pytest.mark.parametrize("backend", [kernel.name for kernel in KERNELS])
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
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
    if checkpoint_format == "gptq_p" and bits == 3:  # planes hold whole runs of 32
        columns, outputs = columns // 32 * 32 + 32, outputs // 32 * 32 + 32
    weight = random_weight(bits, columns, outputs, min(size, columns), sym=sym, act_order=act_order)
    weight = QuantizedWeight(weight.codes, weight.scales.to(scales_dtype), weight.zeros, weight.g_idx, bits)
    spec, tensors = encode(weight, checkpoint_format, word_dtype)
    spec = dataclasses.replace(spec, g_idx_dtype=index_dtype)
    tensors["g_idx"] = tensors["g_idx"].to(index_dtype)
    used = columns * bits % (word_dtype.itemsize * 8)
    if filled and used and bits != 3:  # what lies behind the last code; of 3 bits, codes cross words
        tensors["qweight"][-1] |= torch.tensor(-1, dtype=word_dtype) << used
    layer = QuantLinear(spec, backend=backend)
    layer.load_state_dict(tensors)
    if next(kernel for kernel in KERNELS if kernel.name == backend).supports(spec, CPU) is not None:
        pytest.skip(f"{backend} does not serve this machine's CPU")
    found = layer.prepare().state_dict()
    assert found.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert found[name].dtype == tensor.dtype, name
        assert torch.equal(found[name], tensor), name
    torch.testing.assert_close(layer.dequantize(torch.float32).weight, weight.dequantize())
