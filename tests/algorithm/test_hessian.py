"""Second moments and their factor: dead channels, damaged rows, matrices that cannot be factored."""

from __future__ import annotations

import pytest
import torch

from gptq_backend import CalibrationError, QuantizeConfig
from gptq_backend.algorithm import hessian as hessian_module
from gptq_backend.algorithm.gptq import prepare_factor
from gptq_backend.algorithm.hessian import Hessian, factor


@pytest.mark.parametrize("channels", [5, 256, 300])  # below, at and across the tile of the triangular accumulation
def test_equals_the_sum_of_outer_products(channels: int) -> None:
    batches = [torch.randn(2, 7, channels), torch.randn(3, channels)]
    hessian = Hessian(channels, torch.float64)
    for batch in batches:
        hessian.add(batch)
    rows = torch.cat([batch.reshape(-1, channels) for batch in batches]).double()
    assert torch.allclose(hessian.matrix("layer"), rows.t() @ rows, atol=1e-12)
    assert torch.equal(hessian.matrix("layer"), hessian.matrix("layer").t())
    assert (hessian.tokens, hessian.dropped) == (17, 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_16_bit_inputs_accumulate_in_float32(dtype: torch.dtype) -> None:
    """Ten thousand squares in fp16 would stop growing, or overflow."""
    hessian = Hessian(2)
    x = torch.full((10_000, 2), 10.0, dtype=dtype)
    hessian.add(x)
    assert torch.allclose(hessian.matrix("layer"), torch.full((2, 2), 1e6), rtol=1e-4)


def teston_tensor_cores_get_16_bit_rows_and_add_to_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU; here with a stand-in for the product, which CPUs lack."""
    seen = set()

    def multiply(left: torch.Tensor, right: torch.Tensor, out_dtype: torch.dtype) -> torch.Tensor:
        seen.update((left.dtype, right.dtype))
        return left.to(out_dtype) @ right.to(out_dtype)

    x = torch.randn(40, 300).bfloat16()
    x[3, 7] = float("inf")
    expected = Hessian(300)
    expected.add(x)
    monkeypatch.setattr(hessian_module, "on_tensor_cores", lambda rows, total: True)
    monkeypatch.setattr(torch, "mm", multiply)
    hessian = Hessian(300)
    hessian.add(x)
    assert seen == {torch.bfloat16}
    assert (hessian.tokens, hessian.dropped) == (39, 1)
    torch.testing.assert_close(hessian.matrix("layer"), expected.matrix("layer"))


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_damaged_rows_are_dropped_and_counted(bad: float) -> None:
    x = torch.randn(10, 4)
    damaged = x.clone()
    damaged[3, 1] = bad
    hessian, expected = Hessian(4), Hessian(4)
    hessian.add(damaged)
    expected.add(torch.cat([x[:3], x[4:]]))
    assert torch.equal(hessian.matrix("layer"), expected.matrix("layer"))
    assert (hessian.tokens, hessian.dropped) == (9, 1)


def test_infinities_that_cancel_in_a_sum_are_still_seen() -> None:
    hessian = Hessian(2)
    hessian.add(torch.tensor([[float("inf"), -float("inf")], [1.0, 2.0]]))
    assert (hessian.tokens, hessian.dropped) == (1, 1)
    assert hessian.matrix("layer").isfinite().all()


def test_all_rows_damaged_names_the_module() -> None:
    hessian = Hessian(4)
    hessian.add(torch.full((3, 4), float("nan")))
    with pytest.raises(CalibrationError, match=r"model\.layers\.0\.q_proj.*all 3 calibration tokens"):
        hessian.matrix("model.layers.0.q_proj")


def test_large_finite_activations_do_not_count_as_damaged() -> None:
    """The sum over a batch can overflow float32 where no entry and no product does."""
    hessian = Hessian(2, torch.float64)
    hessian.add(torch.full((4, 2), 1e38))
    assert (hessian.tokens, hessian.dropped) == (4, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_factor_inverts_the_damped_matrix(dtype: torch.dtype) -> None:
    x = torch.randn(200, 30, dtype=dtype)
    hessian = x.t() @ x
    result = factor(hessian, 0.05)
    damped = hessian + 0.05 * hessian.diagonal().median() * torch.eye(30, dtype=dtype)
    assert torch.equal(result.upper, result.upper.triu())
    assert torch.allclose(result.upper.t() @ result.upper @ damped, torch.eye(30, dtype=dtype), atol=1e-4)
    assert (result.method, result.damp_percent) == ("cholesky", 0.05)


def test_a_massive_channel_does_not_damp_the_others() -> None:
    """One channel with a million times the energy of the rest, as behind a massive activation."""
    x = torch.randn(200, 30, dtype=torch.float64)
    alone = factor(x[:, 1:].t() @ x[:, 1:], 0.05).upper
    x[:, 0] *= 1e3
    beside = factor(x.t() @ x, 0.05).upper
    torch.testing.assert_close(beside[1:, 1:], alone, rtol=0.1, atol=0.1 * float(alone.abs().mean()))


def test_rank_deficient_matrix_is_damped_not_refused() -> None:
    row = torch.randn(1, 64)
    result = factor(row.t() @ row + 1e-6 * torch.eye(64), 0.01)
    assert result.upper.isfinite().all()


def test_retry_raises_the_damping_and_reports_it() -> None:
    """An indefinite matrix (accumulated rounding): -0.02 is beyond the first damping and within the second."""
    matrix = torch.eye(50)
    matrix[3, 3] = -0.02
    result = factor(matrix, 0.01)
    assert result.method == "cholesky damped more"
    assert result.damp_percent == pytest.approx(0.03)


def test_hopeless_matrix_falls_back_to_its_diagonal_and_says_so() -> None:
    matrix = torch.full((4, 4), 5.0) + torch.eye(4)
    matrix[0, 1] = matrix[1, 0] = 1e6
    result = factor(matrix, 0.01)
    assert result.method == "diagonal"
    assert result.upper.isfinite().all()
    assert torch.equal(result.upper, result.upper.diagonal().diag())


def test_float64_is_tried_before_the_diagonal(monkeypatch: pytest.MonkeyPatch) -> None:
    """Float32 fails on a matrix whose condition is beyond it; without damping to speak of, float64 still factors."""
    scale = torch.logspace(0, -6, 24, dtype=torch.float64)
    mix = torch.linalg.qr(torch.randn(24, 24, dtype=torch.float64)).Q
    matrix = (mix * scale.square()) @ mix.t()
    matrix = ((matrix + matrix.t()) / 2).float()
    result = factor(matrix + 0, 1e-12)
    assert result.method in ("cholesky float64", "diagonal")
    assert result.upper.isfinite().all()


def test_dead_channels_get_a_typical_diagonal_and_no_influence() -> None:
    x = torch.randn(100, 6)
    x[:, 2] = 0
    shared = prepare_factor(x.t() @ x, QuantizeConfig(group_size=3, act_group_aware=False))
    live = [0, 1, 3, 4, 5]
    assert shared.hessian[2, 2] == shared.hessian.diagonal()[live].median()
    upper = shared.factor.upper
    off_diagonal = torch.cat([upper[2, :2], upper[2, 3:], upper[:2, 2], upper[3:, 2]])
    assert not off_diagonal.any()


def test_tile_is_smaller_than_the_widest_test() -> None:
    assert hessian_module._TILE < 300, "test_equals_the_sum_of_outer_products no longer crosses a tile"
