"""The kernels that ``inspect`` names are those that loading gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gptq_backend import QuantLinear
from gptq_backend.kernels import reference
from gptq_backend.kernels import table as kernels
from gptq_backend.kernels.triton import operators as triton
from gptq_cli.inspection import Layer, _kernels
from tests.format.test_stored_tensors import random_weight


def test_experts_are_served_by_the_row_with_a_grouped_product(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose fastest row has none, as NVIDIA GPUs are."""
    fastest = dataclasses.replace(reference.KERNEL, name="fastest")
    grouped = dataclasses.replace(triton.KERNEL, name="grouped", supports=lambda spec, device: None)
    monkeypatch.setenv("GPTQ_BACKEND_SELF_CHECK", "0")  # Triton multiplies nothing here
    monkeypatch.setattr(kernels, "KERNELS", [fastest, grouped, reference.KERNEL])
    monkeypatch.setattr(kernels, "EXPERT_KERNELS", [dataclasses.replace(triton.EXPERTS, kernel=grouped)])
    layer = QuantLinear.from_weight(random_weight(4, 64, 32, 16))
    names = ["model.layers.0.q_proj", "model.layers.0.mlp.experts.0.w1", "model.layers.0.mlp.experts.1.w1"]
    found = _kernels([Layer(name, layer.spec, layer.spec) for name in names], torch.device("cpu"))
    assert {entry["kernel"]: entry["modules"] for entry in found} == {"fastest": 1, "grouped": 2}
    assert {entry["kernel"]: entry["declined"] for entry in found} == {
        "fastest": {},
        "grouped": {"fastest": {"has no grouped product for experts": 2}},
    }
    assert layer.prepare(expert=True).kernel is grouped
