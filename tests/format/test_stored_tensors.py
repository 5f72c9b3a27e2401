"""What is saved dequantizes bit for bit to what was optimised, in every format; damaged values name their module."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_backend import CheckpointError, ConfigError, QuantizeConfig, QuantizedWeight, QuantLinear, StoredSpec
from gptq_backend.algorithm.gptq import prepare_factor, quantize_weight
from gptq_backend.format import packing
from gptq_backend.format.stored_tensors import (
    decode,
    encode,
    read_packed,
    read_quantized,
    resolve,
    stored_words,
    unpack_zeros,
)

FORMATS = ("gptq", "gptq_v2", "gptq_p")
bits_strategy = st.sampled_from([2, 3, 4, 8])


def random_weight(
    bits: int, columns: int, outputs: int, size: int, seed: int = 0, act_order: bool = False, sym: bool = False
) -> QuantizedWeight:
    generator = torch.Generator().manual_seed(seed)
    groups = -(-columns // size)
    g_idx = torch.arange(columns, dtype=torch.int32) // size
    if act_order:
        g_idx = g_idx[torch.randperm(columns, generator=generator)]
    top = 1 << bits
    zeros = torch.randint(0, top, (groups, outputs), generator=generator, dtype=torch.uint8)
    return QuantizedWeight(
        codes=torch.randint(0, top, (columns, outputs), generator=generator, dtype=torch.uint8),
        scales=(torch.rand(groups, outputs, generator=generator) + 0.1).half(),
        zeros=torch.full_like(zeros, top // 2) if sym else zeros,
        g_idx=g_idx,
        bits=bits,
    )


def assert_same(got: QuantizedWeight, expected: QuantizedWeight) -> None:
    assert got.bits == expected.bits
    for name in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


@given(bits_strategy, st.integers(1, 70), st.integers(1, 40), st.sampled_from([1, 7, 32, 200]), st.booleans())
def test_encode_decode_round_trip(bits: int, columns: int, outputs: int, size: int, act_order: bool) -> None:
    weight = random_weight(bits, columns, outputs, size, seed=columns, act_order=act_order)
    for checkpoint_format in FORMATS[:2]:
        spec, tensors = encode(weight, checkpoint_format)
        assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == spec.shapes
        assert {name: tensor.dtype for name, tensor in tensors.items()} == spec.dtypes
        assert_same(read_packed(spec, tensors, "layer").unpack(), weight)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 7, 8])
def test_planar_round_trip(bits: int) -> None:
    weight = random_weight(bits, 64, 96, 32)
    spec, tensors = encode(weight, "gptq_p")
    assert spec.planar == (bits in (3, 5, 6, 7))
    assert_same(read_quantized(spec, tensors, "layer"), weight)
    assert_same(decode(tensors, bits, "gptq_p"), weight)


@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [5, 6, 7])
def test_codes_that_no_kernel_multiplies_are_wider_in_memory_and_the_same_numbers(bits: int, sym: bool) -> None:
    weight = random_weight(bits, 64, 96, 32, sym=sym, act_order=True)
    spec, tensors = encode(weight, "gptq_p")
    packed = read_packed(spec, tensors, "layer")
    assert packed.spec.bits == 8
    assert packed.spec.sym == sym
    assert torch.equal(packed.unpack().dequantize(), weight.dequantize())
    assert_same(packed.unpack(), weight.held())
    assert torch.equal(stored_words(spec, packed.qweight), tensors["qweight"])


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2"])
def test_a_format_without_planes_refuses_codes_of_five_bits(checkpoint_format: str) -> None:
    with pytest.raises(ConfigError, match=f"'{checkpoint_format}' cannot hold 5-bit codes.*use 'gptq_p'"):
        encode(random_weight(5, 64, 32, 32), checkpoint_format)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_v1_zero_wraps_inside_its_field(bits: int) -> None:
    """z = 0 is stored as 2**bits - 1; the neighbours must not notice."""
    weight = random_weight(bits, 16, 40, 8)
    zeros = weight.zeros.clone()
    zeros[:, ::3] = 0
    weight = dataclasses.replace(weight, zeros=zeros)
    spec, tensors = encode(weight, "gptq")
    stored = packing.unpack(tensors["qzeros"].t(), bits, 40).t()
    assert (stored[:, ::3] == (1 << bits) - 1).all()
    assert torch.equal(unpack_zeros(spec, tensors["qzeros"]), zeros)


@pytest.mark.parametrize("word", [torch.int8, torch.int16, torch.int64])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_other_word_types_decode_to_the_same_weight(word: torch.dtype, bits: int) -> None:
    weight = random_weight(bits, 64, 48, 16)
    spec, tensors = encode(weight, "gptq")
    foreign = dataclasses.replace(spec, word_dtype=word)
    shapes = foreign.shapes
    tensors["qweight"] = packing.from_int32_words(tensors["qweight"], word, 0, shapes["qweight"][0])
    tensors["qzeros"] = packing.from_int32_words(tensors["qzeros"], word, 1, shapes["qzeros"][1])
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == shapes
    assert_same(read_packed(foreign, tensors, "layer").unpack(), weight)


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ConfigError, match="checkpoint_format='gptq_v9' is not supported; choose one of .*'gptq_v2'"):
        encode(random_weight(4, 32, 8, 32), "gptq_v9")


@pytest.mark.parametrize("checkpoint_format", FORMATS)
@pytest.mark.parametrize("options", [{}, {"desc_act": True}, {"static_groups": True, "desc_act": True}, {"sym": False}])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_saved_weight_is_the_optimised_one_bit_for_bit(
    bits: int, options: dict[str, bool], checkpoint_format: str, tmp_path: Path
) -> None:
    columns = 96 if checkpoint_format == "gptq_p" else 90  # a ragged last group where the format allows it
    weight, x = torch.randn(32, columns), torch.randn(200, columns)
    config = QuantizeConfig(bits=bits, group_size=32, checkpoint_format=checkpoint_format, **options)
    quantized = quantize_weight(weight, prepare_factor(x.t() @ x, config), config).weight
    optimised = quantized.dequantize(torch.float64)
    layer = QuantLinear.from_weight(quantized, torch.randn(32), checkpoint_format)
    save_file(layer.prepare().state_dict(), tmp_path / "layer.safetensors")
    again = QuantLinear(layer.stored_spec, device="meta")
    again.load_state_dict(load_file(tmp_path / "layer.safetensors"), assign=True)
    assert_same(again.quantized_weight(), quantized)
    assert torch.equal(again.quantized_weight().dequantize(torch.float64), optimised)
    assert torch.equal(layer.dequantize(torch.float64).weight, quantized.dequantize().double())
    identity = torch.eye(columns, dtype=torch.float64)
    assert torch.equal(torch.nn.functional.linear(identity, optimised), again(identity) - again.bias.double())


def stored(**changes: object) -> tuple[StoredSpec, dict[str, Tensor]]:
    spec, tensors = encode(random_weight(4, 32, 16, 8, sym=True))
    return dataclasses.replace(spec, **changes), tensors  # type: ignore[arg-type]


@pytest.mark.parametrize("bits", [5, 6, 7])
def test_a_spec_without_planes_cannot_have_codes_that_lie_in_planes_only(bits: int) -> None:
    spec, tensors = encode(random_weight(bits, 64, 32, 16), "gptq_p")
    for read in (read_packed, read_quantized):
        with pytest.raises(ConfigError, match=f"up_proj: its spec has {bits}-bit codes .* pass planar=True"):
            read(dataclasses.replace(spec, planar=False), tensors, "up_proj")


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_damaged_scales_name_the_module(bad: float) -> None:
    spec, tensors = stored()
    tensors["scales"][1, 2] = bad
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.k_proj\.scales: 1 values are NaN or infinite"):
        resolve(spec, tensors, "model.layers.0.k_proj")


@pytest.mark.parametrize("bad", [-1, 4, 2**31 - 1])
def test_g_idx_out_of_range_names_the_module(bad: int) -> None:
    spec, tensors = stored()
    tensors["g_idx"][5] = bad
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.k_proj\.g_idx: .*expected 0\.\.3"):
        resolve(spec, tensors, "model.layers.0.k_proj")


@pytest.mark.parametrize("label", [0, 1])
@pytest.mark.parametrize("written", ["gptq", "gptq_v2"])
def test_symmetric_zeros_mean_the_middle_whatever_the_label(written: str, label: int) -> None:
    """v2 zeros under a v1 label are in circulation; taken literally, every weight is off by one step."""
    weight = random_weight(4, 32, 16, 8, sym=True)
    spec, tensors = encode(weight, written)
    spec = dataclasses.replace(spec, zero_offset=label)
    assert_same(read_packed(spec, tensors, "layer").unpack(), weight)


def test_varying_zeros_under_a_sym_label_are_used_and_reported(caplog: pytest.LogCaptureFixture) -> None:
    weight = random_weight(4, 32, 16, 8)
    spec, tensors = encode(weight, "gptq")
    with caplog.at_level(logging.WARNING):
        resolved = resolve(dataclasses.replace(spec, sym=True), tensors, "mlp.down_proj")
    assert "mlp.down_proj" in caplog.text
    assert not resolved.sym
    assert_same(read_packed(resolved, tensors, "layer").unpack(), weight)


def test_asymmetric_zeros_trust_the_format() -> None:
    """All zeros at 7 or 8 may be what an asymmetric grid really has."""
    weight = dataclasses.replace(random_weight(4, 32, 16, 8), zeros=torch.full((4, 16), 7, dtype=torch.uint8))
    for checkpoint_format in FORMATS:
        spec, tensors = encode(weight, checkpoint_format)
        assert not spec.sym
        assert_same(read_packed(spec, tensors, "layer").unpack(), weight)


@pytest.mark.parametrize(("columns", "size"), [(32, 8), (30, 8), (7, 8)])
def test_trivial_g_idx_is_no_act_order_and_may_be_absent(columns: int, size: int) -> None:
    weight = random_weight(4, columns, 16, size, sym=True)
    spec, tensors = encode(weight)
    assert not resolve(spec, tensors, "layer").act_order
    del tensors["g_idx"]
    absent = resolve(dataclasses.replace(spec, has_g_idx=False), tensors, "layer")
    assert_same(read_packed(absent, tensors, "layer").unpack(), weight)


def test_real_g_idx_is_act_order() -> None:
    spec, tensors = encode(random_weight(4, 32, 16, 8, act_order=True))
    assert resolve(dataclasses.replace(spec, act_order=False), tensors, "layer").act_order


def test_spec_counts_its_bytes() -> None:
    spec, tensors = encode(random_weight(3, 90, 259, 32))
    assert spec.nbytes == sum(tensor.nbytes for tensor in tensors.values())
