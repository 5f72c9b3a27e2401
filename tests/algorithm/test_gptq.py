"""The production column loop against tests/naive.py, and what it must not get wrong."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from torch import Tensor

from gptq_backend import CalibrationError, QuantizeConfig
from gptq_backend.algorithm.gptq import QuantizedLayer, prepare_factor, quantize_weight
from gptq_backend.format.weight import QuantizedWeight
from tests import naive

ORDERS = {
    "plain": {"act_group_aware": False},
    "desc_act": {"desc_act": True},
    "static": {"static_groups": True},
    "static desc_act": {"desc_act": True, "static_groups": True},
    "group aware": {"act_group_aware": True},
    "static group aware": {"act_group_aware": True, "static_groups": True},
}
# 72 columns: groups of 24 divide it, of 32 leave a ragged tail, -1 is one group.
OUT, IN, GROUP_SIZES = 24, 72, (24, 32, -1)


def layer(seed: int, outputs: int = OUT, columns: int = IN) -> tuple[Tensor, Tensor]:
    """A weight and the Hessian of correlated, unevenly scaled inputs (as activations are)."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(outputs, columns, generator=generator, dtype=torch.float64)
    mix = torch.randn(columns, columns, generator=generator, dtype=torch.float64) / columns**0.5
    spread = torch.linspace(-1, 1, columns, dtype=torch.float64)[torch.randperm(columns, generator=generator)].exp()
    x = torch.randn(4 * columns, columns, generator=generator, dtype=torch.float64)
    x = x @ (mix + torch.eye(columns)) * spread
    return weight.float().double(), (x.t() @ x).float().double()  # so that float32 starts from the same values


def run(weight: Tensor, hessian: Tensor, config: QuantizeConfig) -> QuantizedLayer:
    return quantize_weight(weight, prepare_factor(hessian, config), config)


def loss(quantized: QuantizedWeight, weight: Tensor, hessian: Tensor) -> float:
    difference = quantized.dequantize(torch.float64) - weight
    return float(((difference @ hessian) * difference).sum())


def assert_identical(got: QuantizedWeight, expected: QuantizedWeight) -> None:
    for name in ("codes", "scales", "zeros", "g_idx"):
        assert torch.equal(getattr(got, name), getattr(expected, name)), name


def options(bits: int, order: str) -> list[QuantizeConfig]:
    return [
        QuantizeConfig(bits=bits, sym=sym, group_size=group_size, scale_search=search, quality="fast", **ORDERS[order])
        for sym, group_size, search in itertools.product((True, False), GROUP_SIZES, (True, False))
    ]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_float64_is_identical_to_the_naive_algorithm(bits: int, order: str) -> None:
    for config in options(bits, order):
        weight, hessian = layer(seed=bits)
        assert_identical(run(weight, hessian, config).weight, naive.gptq(weight, hessian, config))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_float32_inputs_give_what_float64_gives(bits: int, order: str) -> None:
    """A near-tie that float32 rounds the other way changes the rest of its output channel."""
    for config in options(bits, order):
        weight, hessian = layer(seed=bits, outputs=48)
        single, double = run(weight.float(), hessian.float(), config), run(weight, hessian, config)
        assert float((single.weight.codes == double.weight.codes).double().mean()) >= 0.999, config
        ratio = loss(single.weight, weight, hessian) / loss(double.weight, weight, hessian)
        assert ratio == pytest.approx(1, abs=1e-4), config


@pytest.mark.parametrize("group_size", GROUP_SIZES)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding_to_nearest_agrees_with_the_naive_algorithm(bits: int, sym: bool, group_size: int) -> None:
    config = QuantizeConfig(bits=bits, sym=sym, group_size=group_size, act_group_aware=False, quality="fast")
    weight, _ = layer(seed=bits)
    assert_identical(quantize_weight(weight, None, config).weight, naive.gptq(weight, None, config))


@pytest.mark.parametrize("order", ORDERS)
def test_layers_wider_than_a_panel_agree_with_the_naive_algorithm(order: str) -> None:
    """The lazy update between panels: 200 columns in groups of 96, and of 150, wider than a panel."""
    weight, hessian = layer(seed=5, outputs=4, columns=200)
    for group_size in (96, 150):
        config = QuantizeConfig(bits=4, group_size=group_size, quality="fast", **ORDERS[order])
        assert_identical(run(weight, hessian, config).weight, naive.gptq(weight, hessian, config))


def test_beats_rounding_to_nearest_and_search_beats_min_max() -> None:
    weight, hessian = layer(seed=1)
    config = QuantizeConfig(bits=3, group_size=24)
    searched = loss(run(weight, hessian, config).weight, weight, hessian)
    unsearched = loss(run(weight, hessian, dataclasses.replace(config, scale_search=False)).weight, weight, hessian)
    nearest = loss(quantize_weight(weight, None, config).weight, weight, hessian)
    assert searched < unsearched < nearest


def test_reported_loss_is_the_layers_output_error() -> None:
    generator = torch.Generator().manual_seed(3)
    weight, x = torch.randn(8, 16, generator=generator), torch.randn(100, 16, generator=generator)
    config = QuantizeConfig(bits=4, group_size=8)
    result = quantize_weight(weight, prepare_factor(x.t() @ x, config), config, tokens=100)
    error = x @ (result.weight.dequantize() - weight).t()
    assert result.loss == pytest.approx(float(error.square().mean()), rel=1e-4)
    share = float(error.square().sum() / (x @ weight.t()).square().sum())
    assert result.relative_loss == pytest.approx(share, rel=1e-4)


def test_dead_channels_are_rounded_not_zeroed() -> None:
    """A channel that calibration never excited may be alive elsewhere."""
    weight, hessian = layer(seed=2)
    hessian[5], hessian[:, 5] = 0, 0
    for options in ORDERS.values():
        config = QuantizeConfig(bits=8, group_size=24, quality="fast", **options)
        result = run(weight, hessian, config).weight
        assert_identical(result, naive.gptq(weight, hessian, config))
        assert torch.allclose(result.dequantize(torch.float64)[:, 5], weight[:, 5], atol=0.05)


def test_all_channels_dead_is_rounding_to_nearest() -> None:
    weight, hessian = layer(seed=2)
    config = QuantizeConfig(bits=4, group_size=24, act_group_aware=False, quality="fast")
    assert_identical(
        run(weight, torch.zeros_like(hessian), config).weight, quantize_weight(weight, None, config).weight
    )


@pytest.mark.parametrize("sym", [True, False])
def test_a_group_of_zeros_gets_scale_one_and_stays_zero(sym: bool) -> None:
    weight, _ = layer(seed=4)
    weight[3, :24] = 0
    for order in ("plain", "static"):
        result = run(weight, torch.eye(IN).double(), QuantizeConfig(group_size=24, sym=sym, **ORDERS[order])).weight
        assert result.scales[0, 3] == 1
        assert not result.dequantize()[3, :24].any()


def test_weights_below_what_float16_can_scale_give_no_zero_scale() -> None:
    weight, hessian = layer(seed=4)
    result = run(weight * 1e-9, hessian, QuantizeConfig(group_size=24)).weight
    assert result.scales.min() > 0
    assert result.dequantize().isfinite().all()


def test_small_weights_keep_their_precision_at_8_bits() -> None:
    """Their scales are subnormal in float16; floored at the smallest normal, most codes would go unused."""
    weight, hessian = layer(seed=4)
    config = QuantizeConfig(bits=8, group_size=24)
    small, usual = run(weight * 2e-4, hessian, config), run(weight, hessian, config)
    assert small.relative_loss < 2 * usual.relative_loss


def test_scale_overflow_names_the_module() -> None:
    weight, _ = layer(seed=4)
    with pytest.raises(CalibrationError, match=r"model\.layers\.3\.q_proj.*overflows"):
        quantize_weight(weight * 1e9, None, QuantizeConfig(group_size=24), name="model.layers.3.q_proj")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_damaged_weight_names_the_module(value: float) -> None:
    weight, _ = layer(seed=4)
    weight[1, 2] = value
    with pytest.raises(CalibrationError, match=r"mlp\.up_proj\.weight.*NaN or infinite"):
        quantize_weight(weight, None, QuantizeConfig(group_size=24), name="mlp.up_proj")


def test_same_input_gives_same_codes() -> None:
    weight, hessian = layer(seed=6)
    config = QuantizeConfig(bits=4, group_size=24)
    assert_identical(run(weight, hessian, config).weight, run(weight.clone(), hessian.clone(), config).weight)


def test_inputs_are_left_alone() -> None:
    weight, hessian = layer(seed=6)
    hessian[5], hessian[:, 5] = 0, 0
    before = weight.clone(), hessian.clone()
    run(weight, hessian, QuantizeConfig(bits=4, group_size=24, desc_act=True))
    assert torch.equal(weight, before[0])
    assert torch.equal(hessian, before[1])


def test_codes_were_chosen_for_the_stored_scales() -> None:
    """Without calibration each code is the nearest on the grid of the *stored* scale."""
    weight, _ = layer(seed=7)
    config = QuantizeConfig(bits=4, group_size=24)
    result = quantize_weight(weight, None, config).weight
    assert result.scales.dtype == torch.float16
    scale = result.scales.double().repeat_interleave(24, 0)
    nearest = (torch.round(weight.t() / scale) + 8).clamp(0, 15).to(torch.uint8)
    assert torch.equal(result.codes, nearest)
