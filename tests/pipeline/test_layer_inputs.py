"""Which layers a run quantizes, which inputs make which Hessian, and in which order."""

from __future__ import annotations

import copy
import logging

import pytest
import torch
from torch import Tensor, nn

from gptq_backend import CalibrationError, ConfigError, QuantizeConfig, QuantLinear, RunOptions, quantize_model
from tests.pipeline.hessians import assert_upper_equal, config, quantized_names, second_moments
from tests.toy import Mlp, SparseMlp, listener, samples, toy


def test_all_block_layers_are_quantized_and_router_head_and_embedding_are_not() -> None:
    model = toy(mlp=SparseMlp)
    report = quantize_model(model, config(), samples())
    attention = [f"attn.{name}" for name in "qkvo"]
    experts = [f"mlp.experts.{i}.{name}" for i in range(3) for name in ("gate", "up", "down")]
    expected = [f"blocks.{i}.{name}" for i in range(2) for name in attention + experts]
    assert quantized_names(model) == expected
    assert sorted(entry.name for entry in report.layers) == sorted(expected)
    assert type(model.blocks[0].mlp.gate) is nn.Linear
    assert type(model.lm_head) is nn.Linear


def test_one_hessian_per_distinct_input(hessians: list[Tensor]) -> None:
    quantize_model(toy(), config(), samples())
    assert len(hessians) == 2 * 4  # q/k/v, o, gate/up, down


def test_parallel_attention_and_mlp_share_one_hessian(hessians: list[Tensor]) -> None:
    quantize_model(toy(parallel=True), config(), samples())
    assert len(hessians) == 2 * 3  # q/k/v/gate/up, o, down


def test_layers_of_one_input_with_other_settings_share_the_hessian_but_not_its_factor(hessians: list[Tensor]) -> None:
    model = toy(blocks=1)
    rules = {r".*\.v": {"group_size": 8, "desc_act": True, "act_group_aware": False}}
    report = quantize_model(model, config(dynamic=rules), samples())
    assert len(hessians) == 4
    groups = {entry.name: entry.group_size for entry in report.layers}
    assert (groups["blocks.0.attn.q"], groups["blocks.0.attn.v"]) == (16, 8)
    alone = toy(blocks=1)
    rules = {r"-:.*\.[qk]$": {}, **rules}
    quantize_model(alone, config(dynamic=rules), samples())
    assert torch.equal(model.blocks[0].attn.v.quantized_weight().codes, alone.blocks[0].attn.v.quantized_weight().codes)


@pytest.mark.parametrize("batch_size", [1, 4])
def test_true_sequential_layers_are_optimised_on_the_inputs_they_will_see(
    hessians: list[Tensor], batch_size: int
) -> None:
    model, data = toy(), samples()
    quantize_model(model, config(bits=2), data, options=RunOptions(batch_size=batch_size))
    firsts = [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.q", "attn.o", "mlp.gate", "mlp.down")]
    final = second_moments(model, firsts, data)
    for made, name in zip(hessians, firsts, strict=True):
        assert_upper_equal(made, final[name])


def test_without_true_sequential_a_block_is_measured_dense_behind_quantized_blocks(hessians: list[Tensor]) -> None:
    model, data = toy(), samples()
    original = copy.deepcopy(model)
    quantize_model(model, config(bits=2, true_sequential=False), data)
    firsts = ["attn.q", "attn.o", "mlp.gate", "mlp.down"]
    for i in range(2):
        if i:
            original.blocks[i - 1] = model.blocks[i - 1]
        expected = second_moments(original, [f"blocks.{i}.{name}" for name in firsts], data)
        for made, name in zip(hessians[4 * i : 4 * i + 4], firsts, strict=True):
            assert_upper_equal(made, expected[f"blocks.{i}.{name}"])


def test_head_is_optimised_on_the_quantized_models_output_and_the_tied_embedding_stays(hessians: list[Tensor]) -> None:
    model, data = toy(tied=True), samples()
    embedding = model.embed.weight.detach().clone()
    report = quantize_model(model, config(lm_head=True), data)
    assert isinstance(model.lm_head, QuantLinear)
    assert torch.equal(model.embed.weight, embedding)
    assert report.layers[-1].name == "lm_head"
    assert_upper_equal(hessians[-1], second_moments(model, ["lm_head"], data)["lm_head"])


def test_calibration_beats_rounding_to_nearest_on_its_own_data() -> None:
    data = samples(16)
    reference = toy()
    ids = torch.stack(data)
    errors = {}
    for calibration in (data, None):
        model = toy()
        quantize_model(model, config(bits=3), calibration)
        with torch.no_grad():
            errors[calibration is None] = float((model(ids) - reference(ids)).square().mean())
    assert errors[False] < 0.8 * errors[True]


def test_rounding_without_calibration_reports_every_layer() -> None:
    model = toy(dtype=torch.float32)
    report = quantize_model(model, config(lm_head=True))
    assert [entry.method for entry in report.layers] == ["rtn"] * 15
    assert len(quantized_names(model)) == 15


def test_the_report_tells_what_each_step_left_of_the_error() -> None:
    report = quantize_model(toy(), config(bits=3), samples(64))
    for entry in report.layers:
        assert [step.name for step in entry.steps] == ["loop", "sweep 1", "sweep 2"], entry.name
        assert entry.steps[-1].error < entry.steps[0].error, entry.name
        assert entry.steps[-1].error == pytest.approx(entry.relative_loss, rel=1e-4), entry.name
    assert all(not entry.steps for entry in quantize_model(toy(), config(quality="fast"), samples()).layers)


def test_few_tokens_are_damped_more_without_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    few, many = (quantize_model(toy(), config(damp_percent=0.01), samples(count)).layers for count in (1, 64))
    for one, other in zip(few, many, strict=True):
        assert one.damp_percent - 0.01 == pytest.approx(64 * (other.damp_percent - 0.01)), one.name
        assert other.damp_percent > 0.01
    assert not caplog.records


def test_a_setting_that_a_reader_would_overlook_stops_a_run() -> None:
    for source in ({"quality": "superb"}, {"dynamic": {r".*\.o": {"quality": "superb"}}}):
        with pytest.raises(ConfigError, match="quality='superb'"):
            quantize_model(toy(), QuantizeConfig.from_dict({"bits": 4, "group_size": 16, **source}), samples())


def test_best_distils_against_the_teacher_and_refuses_to_go_without() -> None:
    settings = config(bits=2, quality="best")
    with pytest.raises(ConfigError, match="teacher="):
        quantize_model(toy(), settings, samples())
    model = toy(dtype=torch.float32)
    report = quantize_model(
        model, settings, samples(16), options=RunOptions(batch_size=2), teacher=lambda: toy(dtype=torch.float32)
    )
    assert report.distillation is not None
    assert len(report.distillation.losses) == 2 * 7
    assert [each.name for each in report.blocks] == ["blocks.0", "blocks.1"]
    untouched = toy()
    with pytest.raises(CalibrationError, match="at least two calibration batches"):
        quantize_model(untouched, settings, samples(2), options=RunOptions(batch_size=2), teacher=toy)
    with pytest.raises(ConfigError, match="training needs calibration data"):
        quantize_model(untouched, settings, None, teacher=toy)
    assert not any(isinstance(module, QuantLinear) for module in untouched.modules()), "found out after the work"


def test_progress_counts_up_to_the_number_of_layers() -> None:
    seen: list[tuple[str, int, int]] = []
    quantize_model(
        toy(),
        config(),
        samples(),
        events=listener(layer_done=lambda entry, done, total: seen.append((entry.name, done, total))),
    )
    assert [done for _, done, _ in seen] == list(range(1, 15))
    assert {total for *_, total in seen} == {14}


# -- experts --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("true_sequential", [True, False])
def test_expert_that_no_token_reaches_is_rounded_with_a_warning(
    true_sequential: bool, caplog: pytest.LogCaptureFixture
) -> None:
    model = toy(blocks=1, mlp=lambda: SparseMlp(unreachable=True))
    with caplog.at_level(logging.WARNING, "gptq_backend"):
        report = quantize_model(model, config(true_sequential=true_sequential), samples())
    methods = {entry.name: entry.method for entry in report.layers}
    unreached = {f"blocks.0.mlp.experts.2.{name}" for name in ("gate", "up", "down")}
    assert {name for name, method in methods.items() if method == "rtn"} == unreached
    assert "blocks.0: no calibration token reached 3 layers of its experts" in caplog.text
    assert set(report.unrouted) == unreached


def test_a_layer_whose_weight_the_models_code_reads_stays_and_the_settings_say_so() -> None:
    class Reader(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            return self.down(x @ self.up.weight.t())

    model, data = toy(mlp=Reader), samples()
    report = quantize_model(model, config(dynamic={".*mlp": {"bits": 8}}), data)
    kept = [f"blocks.{i}.mlp.{name}" for i in range(2) for name in ("gate", "up")]
    assert not set(kept) & set(quantized_names(model))
    model(data[0][None])
    assert [report.config.for_module(name) for name in kept] == [None] * 4
    assert report.config.for_module("blocks.0.mlp.down").bits == 8


@pytest.mark.parametrize("seed", [1, 6, 11])
def test_expert_reached_only_after_its_block_changed_is_quantized_once(seed: int) -> None:
    """Few tokens and two bits: with these seeds routing differs between the dense and the quantized pass of a block."""
    model = toy(seed, blocks=3, mlp=lambda: SparseMlp(8))
    report = quantize_model(
        model, config(bits=2, true_sequential=False), samples(3, 4), options=RunOptions(batch_size=1)
    )
    names = [entry.name for entry in report.layers]
    assert len(names) == len(set(names)) == len(quantized_names(model))


def test_expert_hessians_hold_exactly_the_tokens_routed_to_them(hessians: list[Tensor]) -> None:
    model, data = toy(blocks=1, mlp=SparseMlp), samples()
    report = quantize_model(model, config(), data, options=RunOptions(batch_size=1))
    tokens = {entry.name: entry.tokens for entry in report.layers}
    names = [f"blocks.0.mlp.experts.{i}.gate" for i in range(3)]
    assert sum(tokens[name] for name in names) == tokens["blocks.0.attn.q"] == 4 * 24
    names = [name for name in names if tokens[name]]
    expected = second_moments(model, names, data)
    for made, name in zip(hessians[2::2], names, strict=True):
        assert_upper_equal(made, expected[name])
