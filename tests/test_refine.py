"""What happens to a weight after the column loop, and the wider search for its scales."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from gptq_backend import ConfigError, QuantizeConfig, QuantLinear
from gptq_backend.gptq import prepare_factor, quantize_weight
from gptq_backend.refine import descend, refine, refit_scales
from gptq_backend.weight import QuantizedWeight
from tests.test_gptq import GROUP_SIZES, ORDERS, layer, loss

FAST = {"quality": "fast"}


def quantized(
    bits: int, group_size: int = 24, seed: int = 0, **settings: object
) -> tuple[QuantizedWeight, Tensor, Tensor]:
    weight, hessian = layer(seed)
    config = QuantizeConfig(bits=bits, group_size=group_size, **(FAST | settings))  # type: ignore[arg-type]
    return quantize_weight(weight, prepare_factor(hessian, config), config).weight, weight, hessian


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_neither_step_raises_the_error_it_lowers(bits: int, sym: bool, order: str) -> None:
    for group_size in GROUP_SIZES:
        start, weight, hessian = quantized(bits, group_size, sym=sym, **ORDERS[order])
        for step in (descend, refit_scales):
            result = step(start, weight, hessian)
            assert loss(result, weight, hessian) <= loss(start, weight, hessian) * (1 + 1e-9), step.__name__
            assert int(result.codes.max()) < 1 << bits
            assert result.scales.dtype == start.scales.dtype
            assert torch.equal(result.zeros, start.zeros)
            assert torch.equal(result.g_idx, start.g_idx)


def test_after_enough_sweeps_no_single_code_can_be_improved() -> None:
    """Against brute force: every code of every channel, all others fixed."""
    result, weight, hessian = quantized(3)
    for _ in range(30):
        result = descend(result, weight, hessian)
    least = loss(result, weight, hessian)
    for k in range(0, weight.shape[1], 7):
        for code in range(8):
            codes = result.codes.clone()
            codes[k] = code
            changed = dataclasses.replace(result, codes=codes)
            rows = (
                (changed.dequantize(torch.float64) - weight) @ hessian * (changed.dequantize(torch.float64) - weight)
            ).sum(1)
            base = (
                (result.dequantize(torch.float64) - weight) @ hessian * (result.dequantize(torch.float64) - weight)
            ).sum(1)
            assert bool((rows >= base - 1e-9 * least).all()), (k, code)


def test_refitted_scales_are_the_least_squares_solution() -> None:
    start, weight, hessian = quantized(4)
    start = dataclasses.replace(start, scales=start.scales.double())  # no rounding in the way
    result = refit_scales(start, weight, hessian)
    scales = result.scales.clone().requires_grad_()
    moved = dataclasses.replace(result, scales=scales).dequantize(torch.float64) - weight
    ((moved @ hessian) * moved).sum().backward()
    before = start.scales.clone().requires_grad_()
    moved = dataclasses.replace(start, scales=before).dequantize(torch.float64) - weight
    ((moved @ hessian) * moved).sum().backward()
    assert scales.grad is not None
    assert before.grad is not None
    assert float(scales.grad.norm()) < 1e-4 * float(before.grad.norm())


def test_a_group_whose_codes_are_all_zero_keeps_its_scale() -> None:
    start, weight, hessian = quantized(4)
    codes = start.codes.clone()
    codes[:24] = start.zeros[0]
    start = dataclasses.replace(start, codes=codes)
    result = refit_scales(start, weight, hessian)
    assert torch.equal(result.scales[0], start.scales[0])
    assert result.scales.isfinite().all()


def test_a_refit_does_not_change_the_sign_of_a_scale() -> None:
    start, _, hessian = quantized(4, signed_scales=False)
    opposite = -start.dequantize(torch.float64)
    result = refit_scales(start, opposite, hessian)
    assert float(result.scales.min()) > 0
    assert loss(result, opposite, hessian) <= loss(start, opposite, hessian)


def test_dead_channels_are_rounded_to_nearest_by_the_descent() -> None:
    weight, hessian = layer(seed=2)
    hessian[5], hessian[:, 5] = 0, 0
    config = QuantizeConfig(bits=8, group_size=24)
    result = quantize_weight(weight, prepare_factor(hessian, config, hessian / 8), config).weight
    assert torch.allclose(result.dequantize(torch.float64)[:, 5], weight[:, 5], atol=0.05)


def test_only_what_lowers_the_held_out_error_is_kept() -> None:
    start, weight, hessian = quantized(3)
    _, other = layer(seed=9)
    good, steps = refine(start, weight, hessian, hessian, 2)
    assert [step.name for step in steps] == ["loop", "sweep 1", "sweep 2"]
    assert loss(good, weight, hessian) < loss(start, weight, hessian)
    judged, steps = refine(start, weight, hessian, other, 20)
    kept = [step.error for step in steps if step.kept]
    assert kept == sorted(kept, reverse=True)
    assert [step.kept for step in steps] == [True] * (len(steps) - 1) + [False]
    difference = judged.dequantize(torch.float64) - weight
    share = float(((difference @ other) * difference).sum() / ((weight @ other) * weight).sum())
    assert kept[-1] == pytest.approx(share)


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("sym", [True, False])
def test_each_addition_to_the_plain_algorithm_pays(bits: int, sym: bool) -> None:
    """Over several layers, on the Hessian that they were given."""
    additions = ({}, {"signed_scales": True}, {"search_finalists": 8}, {"refine_sweeps": 2})
    settings: dict[str, object] = {"sym": sym}
    totals = []
    for addition in additions:
        settings |= addition
        totals.append(sum(loss(*quantized(bits, seed=seed, **settings)) for seed in range(5)))
    assert totals == sorted(totals, reverse=True)


def test_the_safe_mode_gives_positive_scales_only() -> None:
    signed, *_ = quantized(4, quality="default")
    safe, *_ = quantized(4, quality="default", signed_scales=False)
    assert float(signed.scales.min()) < 0 < float(safe.scales.min())


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
@pytest.mark.parametrize("backend", ["reference", "cpu"])
def test_negative_scales_give_the_same_output_in_every_kernel(backend: str, bits: int) -> None:
    weight, hessian = layer(seed=5, outputs=32, columns=64)
    config = QuantizeConfig(bits=bits, group_size=32)
    result = quantize_weight(weight, prepare_factor(hessian, config), config).weight
    assert float(result.scales.min()) < 0
    try:
        module = QuantLinear.from_weight(result, None, backend=backend)
    except ConfigError as error:
        pytest.skip(str(error))
    x = torch.randn(3, 64)
    torch.testing.assert_close(module(x), x @ result.dequantize().t(), rtol=1e-4, atol=1e-4)


def test_without_held_out_tokens_nothing_gets_worse_on_those_there_are() -> None:
    weight, hessian = layer(seed=3)
    config = QuantizeConfig(bits=4, group_size=24)
    result = quantize_weight(weight, prepare_factor(hessian, config), config)
    assert result.steps[0].error >= min(step.error for step in result.steps if step.kept)
    assert result.relative_loss == pytest.approx(min(s.error for s in result.steps if s.kept), rel=1e-6)
