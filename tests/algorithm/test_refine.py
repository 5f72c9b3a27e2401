"""What happens to a weight after the column loop, and the wider search for its scales."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from gptq_backend import ConfigError, QuantizeConfig, QuantLinear
from gptq_backend.algorithm.gptq import prepare_factor, quantize_weight
from gptq_backend.algorithm.refine import descend, refine, refit_scales
from gptq_backend.format.weight import QuantizedWeight
from tests.algorithm.test_gptq import GROUP_SIZES, ORDERS, layer, loss

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
    result = quantize_weight(weight, prepare_factor(hessian, config), config).weight
    assert torch.allclose(result.dequantize(torch.float64)[:, 5], weight[:, 5], atol=0.05)


def test_refining_lowers_the_error_that_it_tells() -> None:
    start, weight, hessian = quantized(3)
    result, errors = refine(start, weight, hessian, 0.01, 2)
    assert errors[0] == pytest.approx(loss(start, weight, hessian))
    assert errors[2] == pytest.approx(loss(result, weight, hessian))
    assert errors[0] > errors[1] > errors[2]


def test_the_steps_of_a_layer_are_named_and_end_with_its_error() -> None:
    weight, hessian = layer(seed=3)
    config = QuantizeConfig(bits=3, group_size=24)
    result = quantize_weight(weight, prepare_factor(hessian, config), config)
    assert [step.name for step in result.steps] == ["loop", "sweep 1", "sweep 2"]
    assert result.steps[-1].error == pytest.approx(result.relative_loss)


def test_a_hessian_that_cannot_be_factored_is_not_refined_on() -> None:
    weight, hessian = layer(seed=4)
    hessian[0, 1] = hessian[1, 0] = 1e3 * hessian.diagonal().max()
    config = QuantizeConfig(bits=4, group_size=24)
    shared = prepare_factor(hessian, config)
    assert shared.factor.method == "diagonal"
    assert not quantize_weight(weight, shared, config).steps


def test_few_tokens_are_not_fitted_at_the_cost_of_others() -> None:
    """Half as many tokens as channels: judged by the distribution that they were drawn from."""
    ratios: dict[str, list[float]] = {"refined": [], "not damped more": []}
    for seed in range(4):
        weight, truth = layer(seed)
        torch.manual_seed(seed)
        channels = len(truth)
        x = torch.randn(channels // 2, channels, dtype=torch.float64) @ torch.linalg.cholesky(truth).t()
        config = QuantizeConfig(bits=4, group_size=24)
        found = {}
        for name, sweeps, tokens in (("plain", 0, len(x)), ("refined", 2, len(x)), ("not damped more", 2, 10**9)):
            settings = dataclasses.replace(config, refine_sweeps=sweeps)
            result = quantize_weight(weight, prepare_factor(x.t() @ x, settings, tokens), settings)
            found[name] = loss(result.weight, weight, truth)
        for name, errors in ratios.items():
            errors.append(found[name] / found["plain"])
    assert max(ratios["refined"]) < 1
    assert min(ratios["not damped more"]) > 1


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
    config = QuantizeConfig(bits=bits, group_size=32, damp_percent=0.05)
    result = quantize_weight(weight, prepare_factor(hessian, config), config).weight
    assert (float(result.scales.min()) < 0) == (bits < 8)
    signs = torch.tensor([1, -1]).repeat(16)  # with 8 bits, no search prefers negative ones
    result = dataclasses.replace(result, scales=result.scales * signs)
    try:
        module = QuantLinear.from_weight(result, None, backend=backend)
    except ConfigError as error:
        pytest.skip(str(error))
    x = torch.randn(3, 64)
    torch.testing.assert_close(module(x), x @ result.dequantize().t(), rtol=1e-4, atol=1e-4)
