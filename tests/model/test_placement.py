"""Tensors that come to the device for their turn: all come, all go home, and waiting inputs survive being parked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from gptq_backend import QuantizeConfig, QuantLinear, RunOptions, quantize_model
from gptq_backend.model import placement
from gptq_backend.model.placement import Placement, tensors_of
from tests.format.test_stored_tensors import random_weight
from tests.toy import SparseMlp, samples, toy


@pytest.mark.parametrize("device", [None, "cpu"])
def test_16_bit_parameters_are_float32_on_a_cpu_and_come_back_as_they_were(device: str | None) -> None:
    module = nn.BatchNorm1d(3).bfloat16()
    with torch.no_grad():
        module.weight.copy_(torch.randn(3))
    tensors, expected = tensors_of(module), [tensor.clone() for tensor in tensors_of(module)]
    here = Placement(device)
    for _ in range(2):  # a second time: the home is still the first one
        here.bring(tensors)
    assert [tensor.dtype for tensor in tensors] == [torch.float32] * 2 + [torch.bfloat16] * 2 + [torch.int64]
    assert [here.home(tensor)[1] for tensor in tensors] == [tensor.dtype for tensor in expected]
    here.send_back([*tensors, torch.ones(1)])
    for tensor, before in zip(tensors_of(module), expected):
        assert tensor.dtype == before.dtype
        assert torch.equal(tensor, before)


def test_forgotten_tensors_free_their_memory() -> None:
    module = nn.Linear(4, 4)
    Placement().forget(module.parameters())
    assert not module.weight.numel()


def test_large_waiting_inputs_are_parked_and_the_same_objects_come_back(monkeypatch: pytest.MonkeyPatch) -> None:
    x, small = torch.randn(4, 5), torch.randn(2)
    values, memory = x.clone(), x.data_ptr()
    monkeypatch.setattr(placement, "_PARK_BYTES", 60)
    for where, moves in ((Placement(), False), (Placement("cpu"), True)):
        where.park([x])
        where.park([small])
        assert (x.data_ptr() != memory) is moves
        where.fetch(x)
        assert torch.equal(x, values)


@pytest.mark.parametrize("kwargs", [{}, {"mlp": SparseMlp}])
def test_a_device_and_parking_change_no_bit(kwargs: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    config, data = QuantizeConfig(group_size=16, lm_head=True), samples()
    expected, model = toy(dtype=torch.bfloat16, **kwargs), toy(dtype=torch.bfloat16, **kwargs)
    quantize_model(expected, config, data)
    monkeypatch.setattr(placement, "_PARK_BYTES", 0)
    quantize_model(model, config, data, options=RunOptions(device="cpu"))
    for name, tensor in expected.state_dict().items():
        assert torch.equal(model.state_dict()[name], tensor), name


def test_a_layer_that_moves_after_packing_is_not_prepared_yet() -> None:
    """What a run on a GPU leaves on the CPU; the meta device stands in for the other one."""
    weight = random_weight(4, 32, 8, 16)
    assert "not prepared" not in repr(QuantLinear.from_weight(weight, device=weight.codes.device))
    moved = QuantLinear.from_weight(weight, device=torch.device("meta"))
    assert "not prepared" in repr(moved)
    assert all(tensor.is_meta for tensor in moved.state_dict().values())
