"""Quantizing on a GPU against the same on the CPU: `make test-gpu`."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from gptq_backend import QuantizeConfig, RunOptions, quantize_model
from gptq_backend.algorithm.gptq import prepare_factor, quantize_weight
from gptq_backend.algorithm.hessian import Hessian
from gptq_backend.model import placement
from tests.algorithm.test_gptq import ORDERS, layer, loss
from tests.toy import SparseMlp, samples, toy

pytestmark = pytest.mark.gpu
needs_greenlet = pytest.mark.skipif(
    importlib.util.find_spec("greenlet") is None, reason="greenlet is not installed; quantizing a model needs it"
)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("quality", "sym", "group_size"), [("fast", False, 32), ("default", True, 128), ("fast", True, -1)]
)
def test_a_layer_is_as_good_as_in_float64(order: str, quality: str, sym: bool, group_size: int) -> None:
    config = QuantizeConfig(bits=4, sym=sym, group_size=group_size, quality=quality, **ORDERS[order])
    weight, hessian = layer(seed=3, outputs=300, columns=400)
    expected = quantize_weight(weight, prepare_factor(hessian, config), config)
    on_gpu = weight.float().cuda(), hessian.float().cuda()
    result = quantize_weight(on_gpu[0], prepare_factor(on_gpu[1], config), config).weight
    result = type(result)(*(t.cpu() for t in (result.codes, result.scales, result.zeros, result.g_idx)), result.bits)
    ratio = loss(result, weight, hessian) / loss(expected.weight, weight, hessian)
    assert ratio == pytest.approx(1, abs=0.01)
    if quality == "fast":  # the finalists of the search are chosen in float32, on a CPU too
        assert float((result.codes == expected.weight.codes).double().mean()) > 0.98


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_second_moments_are_summed_in_float32(dtype: torch.dtype) -> None:
    x = (torch.randn(3000, 1300) * 3).to(dtype)
    hessian = Hessian(1300, device="cuda")
    for part in x.split(1000):
        hessian.add(part.cuda())
    expected = x.double().t() @ x.double()
    difference = (hessian.matrix("layer").cpu().double() - expected).norm() / expected.norm()
    assert float(difference) < 1e-5


@needs_greenlet
@pytest.mark.parametrize("kwargs", [{}, {"mlp": SparseMlp}, {"parallel": True}])
@pytest.mark.parametrize("parked", [False, True])
def test_a_model_goes_to_the_gpu_block_by_block_and_comes_back(kwargs, parked, monkeypatch) -> None:
    if parked:
        monkeypatch.setattr(placement, "_PARK_BYTES", 0)
    config, data = QuantizeConfig(group_size=16, lm_head=True), samples(16)
    expected, model = (toy(dtype=torch.float32, blocks=3, **kwargs) for _ in range(2))
    before = quantize_model(expected, config, data)
    report = quantize_model(model, config, data, options=RunOptions(device="cuda"))
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    assert [entry.name for entry in report.layers] == [entry.name for entry in before.layers]
    ours, theirs = (sum(entry.loss for entry in each.layers) for each in (report, before))
    assert ours == pytest.approx(theirs, rel=0.05)
    with torch.no_grad():
        model(torch.stack(data))


@needs_greenlet
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_training_brings_every_block_nearer_in_the_models_own_type(dtype: torch.dtype) -> None:
    """Norms, routers and the head stay in 16 bits, which do not take float32."""
    model, teacher = (toy(dtype=dtype, blocks=3, mlp=SparseMlp) for _ in range(2))
    config = QuantizeConfig(bits=2, group_size=16, quality="best")
    data = samples(32)
    report = quantize_model(
        model, config, data, options=RunOptions(batch_size=4, device="cuda"), teacher=lambda: teacher
    )
    assert sum(each.kept for each in report.blocks) >= 2
    assert report.distillation is not None
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
