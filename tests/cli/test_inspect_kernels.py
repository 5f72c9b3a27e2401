"""The kernels that ``inspect`` names are those that loading gives."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from gptq_backend import KERNELS, QuantLinear, WeightSpec
from gptq_backend.config import HELD_BITS, SUPPORTED_BITS
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
    found = _kernels([Layer(name, layer.stored_spec, layer.stored_spec) for name in names], torch.device("cpu"))
    assert {entry["kernel"]: entry["modules"] for entry in found} == {"fastest": 1, "grouped": 2}
    assert {entry["kernel"]: entry["declined"] for entry in found} == {
        "fastest": {},
        "grouped": {"fastest": {"has no grouped product for experts": 2}},
    }
    assert layer.prepare(expert=True).kernel is grouped


@pytest.mark.parametrize("bits", SUPPORTED_BITS)
def test_kernels_are_asked_about_the_width_in_memory(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def supports(spec: WeightSpec, device: torch.device) -> str | None:
        asked.append(spec.bits)
        return "another time"

    row = dataclasses.replace(reference.KERNEL, name="asked", supports=supports)
    monkeypatch.setattr(kernels, "KERNELS", [row, *KERNELS])
    layer = QuantLinear.from_weight(random_weight(bits, 64, 32, 16), checkpoint_format="gptq_p").unprepare()
    assert layer.spec == layer.stored_spec.weight
    (found,) = _kernels([Layer("q_proj", layer.stored_spec, layer.stored_spec)], torch.device("cpu"))
    assert asked
    assert {*asked} <= {*HELD_BITS}
    kernel = layer.prepare().kernel
    assert kernel is not None
    assert kernel.name == found["kernel"]
