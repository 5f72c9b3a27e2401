"""A packed weight is cut along both axes, padded and joined without changing a value."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from gptq_backend import PackedWeight, QuantizedWeight
from gptq_backend.format import encode, read_packed, side_by_side

K, N = 96, 40


def weight(bits: int, group_size: int = 32, act_order: bool = False, sym: bool = False) -> QuantizedWeight:
    groups = -(-K // group_size)
    g_idx = torch.arange(K, dtype=torch.int32) // group_size
    zeros = torch.randint(0, 2**bits, (groups, N), dtype=torch.uint8)
    return QuantizedWeight(
        torch.randint(0, 2**bits, (K, N), dtype=torch.uint8),
        torch.rand(groups, N).half(),
        torch.full_like(zeros, 2 ** (bits - 1)) if sym else zeros,
        g_idx[torch.randperm(K)] if act_order else g_idx,
        bits,
    )


def piece(hub: QuantizedWeight, **kwargs: Any) -> PackedWeight:
    spec, tensors = encode(hub, **kwargs)
    return read_packed(spec, tensors, "layer")


def dense(cut: PackedWeight) -> torch.Tensor:
    spec = cut.spec
    assert cut.qweight.shape == (-(-spec.in_features * spec.bits // 32), spec.out_features)
    assert cut.zeros.shape == cut.scales.shape == (spec.groups, spec.out_features)
    assert (cut.g_idx is not None) == spec.act_order
    return cut.unpack().dequantize()


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("group_size", [32, 20, K])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize(("first", "count"), [(0, 48), (48, 48), (7, 13), (64, 32), (0, K)])
def test_inputs_are_cut_anywhere(bits: int, group_size: int, act_order: bool, first: int, count: int) -> None:
    hub = weight(bits, group_size, act_order)
    cut = piece(hub).inputs(first, count)
    assert torch.equal(dense(cut), hub.dequantize()[:, first : first + count])
    if group_size == K or (not act_order and first % group_size == 0):
        assert not cut.spec.act_order  # what needs no order of its own is left to the fast path


@pytest.mark.parametrize("checkpoint_format", ["gptq", "gptq_v2", "gptq_p"])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_outputs_are_taken_in_any_order(bits: int, checkpoint_format: str) -> None:
    hub = weight(bits)
    if checkpoint_format == "gptq_p":  # planes hold whole runs of 32
        hub = dataclasses.replace(hub, codes=hub.codes[:, :32], zeros=hub.zeros[:, :32], scales=hub.scales[:, :32])
    whole = piece(hub, checkpoint_format=checkpoint_format)
    for rows in (torch.arange(5, 18), torch.tensor([0, 1, 9, 10, 31])):
        assert torch.equal(dense(whole.outputs(rows)), hub.dequantize()[rows])


@pytest.mark.parametrize("sym", [False, True])
def test_padding_is_zero_and_keeps_symmetry(sym: bool) -> None:
    hub = weight(4, sym=sym)
    padded = piece(hub).padded(64)
    assert torch.equal(dense(padded)[:N], hub.dequantize())
    assert not dense(padded)[N:].any()
    assert padded.spec.sym == sym


def test_only_weights_of_one_form_are_joined() -> None:
    plain, other, ordered = weight(4, sym=True), weight(4, sym=True), weight(4, sym=True, act_order=True)
    shifted = piece(other, checkpoint_format="gptq_v2")
    assert piece(plain).joins(shifted)
    expected = torch.cat([plain.dequantize(), other.dequantize()])
    assert torch.equal(dense(side_by_side([piece(plain), shifted])), expected)
    assert piece(ordered).joins(piece(ordered))
    for left, right in (
        (piece(plain), piece(weight(8, sym=True))),
        (piece(plain), piece(weight(4, 20, sym=True))),
        (piece(plain), piece(ordered)),
        (piece(ordered), piece(weight(4, sym=True, act_order=True))),
        (piece(plain), dataclasses.replace(piece(other), bias=torch.ones(N))),
    ):
        assert not left.joins(right)


def test_a_bias_stays_with_the_first_input() -> None:
    whole = dataclasses.replace(piece(weight(4)), bias=torch.arange(N))
    assert whole.inputs(0, 48).bias is not None
    assert whole.inputs(48, 48).bias is None
    assert torch.equal(whole.outputs(torch.arange(8, 16)).bias, torch.arange(8, 16))
