"""The calibration driver on a toy decoder: which inputs make which Hessian, in which order, and what is left behind."""

from __future__ import annotations

import copy
import logging
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gptq_backend.model.layer_inputs as factors
from gptq_backend import CalibrationError, ConfigError, QuantizeConfig, QuantLinear, RunOptions, quantize_model
from gptq_backend.algorithm.hessian import Hessian
from tests.toy import VOCABULARY, Mlp, SparseMlp, Toy, listener, samples, toy


def config(**settings: Any) -> QuantizeConfig:
    """All tokens count the same, so that Hessians can be compared with plain second moments."""
    return QuantizeConfig(**{"bits": 4, "group_size": 16, "token_weights": False, **settings})


def quantized_names(model: nn.Module) -> list[str]:
    return [name for name, module in model.named_modules() if isinstance(module, QuantLinear)]


@pytest.fixture
def hessians(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """The matrix of every Hessian that is made, in order."""
    made: list[Tensor] = []

    class Recorded(Hessian):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            made.append(self._sum)

    monkeypatch.setattr(factors, "Hessian", Recorded)
    return made


def second_moments(model: nn.Module, names: list[str], data: list[Tensor]) -> dict[str, Tensor]:
    """``sum x x^T`` at the input of each module as the model is now."""
    found: dict[str, Tensor] = {}

    def add(name: str) -> Any:
        def hook(_: nn.Module, args: tuple[Tensor]) -> None:
            rows = args[0].reshape(-1, args[0].shape[-1])
            found[name] = found.get(name, 0) + rows.t() @ rows

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(add(name)) for name in names]
    with torch.no_grad():
        for ids in data:
            model(ids[None])
    for handle in handles:
        handle.remove()
    return found


def assert_upper_equal(made: Tensor, expected: Tensor) -> None:
    """Up to the rounding of float32: the kernels do not sum in the order of torch."""
    torch.testing.assert_close(made.triu(), expected.triu(), rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


# -- what is quantized, and on which inputs ------------------------------------------------------------------------


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
    assert all(f"{name}: no calibration token reached it" in caplog.text for name in unreached)


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


# -- options --------------------------------------------------------------------------------------------------------


def test_edge_blocks_stay_dense_and_pass_their_activations_on(hessians: list[Tensor]) -> None:
    model, data = toy(blocks=4), samples()
    quantize_model(model, config(keep_edge_blocks=1, token_weights=False), data)
    assert {name.split(".")[1] for name in quantized_names(model)} == {"1", "2"}
    assert_upper_equal(hessians[0], second_moments(model, ["blocks.1.attn.q"], data)["blocks.1.attn.q"])


def test_only_listed_modules_are_quantized() -> None:
    model = toy()
    quantize_model(model, config(modules_in_block_to_quantize=("attn.o", "mlp.down")), samples())
    assert quantized_names(model) == [f"blocks.{i}.{name}" for i in range(2) for name in ("attn.o", "mlp.down")]


def test_dynamic_rules_reach_the_layers_and_the_report() -> None:
    model = toy()
    rules = {r"-:.*attn\.k": {}, r".*mlp": {"bits": 8, "sym": False}}
    report = quantize_model(model, config(dynamic=rules), samples())
    assert not any(name.endswith("attn.k") for name in quantized_names(model))
    assert {entry.bits for entry in report.layers if ".mlp." in entry.name} == {8}
    assert not model.blocks[0].mlp.up.spec.sym
    assert model.blocks[0].attn.q.spec.sym


@pytest.mark.parametrize("rule", [{"checkpoint_format": "gptq_v2"}, {"pack_dtype": "int8"}])
def test_a_rule_cannot_give_a_layer_a_format_that_readers_would_not_see(rule: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="a checkpoint has one"):
        quantize_model(toy(), config(dynamic={".*attn": rule}), samples())


@pytest.mark.parametrize("settings", [{}, {"desc_act": True}, {"static_groups": True}, {"act_group_aware": True}])
def test_group_size_that_does_not_divide_the_features(settings: dict[str, Any]) -> None:
    model, reference = toy(), toy()
    quantize_model(model, config(bits=8, group_size=12, **settings), samples())
    down = model.blocks[0].mlp.down
    assert (down.spec.groups, model.blocks[0].attn.q.spec.groups) == (4, 3)
    ids = torch.stack(samples(2, seed=5))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), reference(ids), atol=0.02, rtol=0)


def test_same_inputs_give_the_same_bits() -> None:
    states = []
    for _ in range(2):
        model = toy(dtype=torch.float32)
        quantize_model(model, config(desc_act=True), samples())
        states.append(model.state_dict())
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[0])


# -- calibration data -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(side: str) -> None:
    plain, padded = toy(), toy()
    data = samples(6, 16)
    settings = config(token_weights=True)
    quantize_model(plain, settings, data)
    batches = []
    for ids in data:
        filler, mask = torch.full((5,), 7), torch.ones(16, dtype=torch.long)
        parts = [(filler, torch.zeros_like(filler)), (ids, mask)]
        parts = parts if side == "left" else parts[::-1]
        batches.append(
            {"input_ids": torch.cat([p[0] for p in parts]), "attention_mask": torch.cat([p[1] for p in parts])}
        )
    report = quantize_model(padded, settings, batches)
    assert {entry.tokens for entry in report.layers} == {6 * 16}
    for name in quantized_names(plain):
        one, other = (model.get_submodule(name).quantized_weight() for model in (plain, padded))
        assert torch.equal(one.codes, other.codes), name


def test_samples_of_different_lengths_all_count() -> None:
    report = quantize_model(toy(), config(), samples(3, 24) + samples(2, 7))
    assert {entry.tokens for entry in report.layers} == {3 * 24 + 2 * 7}


def test_non_finite_activations_are_dropped_counted_and_named(caplog: pytest.LogCaptureFixture) -> None:
    model = toy()
    model.embed.weight.data[5] = torch.nan
    good = samples(4)
    for ids in good:
        ids[ids == 5] = 6
    bad = torch.full((24,), 5)
    with caplog.at_level(logging.WARNING, "gptq_backend"):
        report = quantize_model(model, config(token_weights=True), [*good, bad], options=RunOptions(batch_size=2))
    assert {entry.dropped_tokens for entry in report.layers} == {24}
    assert {entry.tokens for entry in report.layers} == {4 * 24}
    assert "blocks.0.attn.q: dropped 24 " in caplog.text
    clean = toy()
    quantize_model(clean, config(token_weights=True), good, options=RunOptions(batch_size=2))
    for name in quantized_names(clean):
        assert torch.equal(
            clean.get_submodule(name).quantized_weight().codes, model.get_submodule(name).quantized_weight().codes
        )


def test_only_non_finite_activations_name_the_first_layer_and_unhook_the_model() -> None:
    model = toy()
    model.blocks[0].norm1.bias.data[3] = torch.inf
    with pytest.raises(CalibrationError, match=r"blocks\.0\.attn\.q: all 96 calibration tokens"):
        quantize_model(model, config(), samples())
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())


def test_error_inside_the_model_is_raised_as_it_is() -> None:
    model = toy()
    with pytest.raises(IndexError):
        quantize_model(model, config(), [torch.tensor([VOCABULARY + 1])])
    assert not quantized_names(model)


# -- what is left behind --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("calibrated", [True, False])
def test_no_parameter_changes_dtype(dtype: torch.dtype, calibrated: bool) -> None:
    model = toy(dtype=dtype, tied=True)
    quantize_model(model, config(lm_head=True, keep_edge_blocks=0), samples() if calibrated else None)
    for name, parameter in model.named_parameters():
        if not parameter.is_floating_point():
            continue
        assert parameter.dtype == (torch.float16 if name.endswith("scales") else dtype), name
    assert model(torch.stack(samples(1))).dtype == dtype


def test_training_mode_and_hooks_are_as_before() -> None:
    model = toy().train()
    model.norm.eval()
    quantize_model(model, config(), samples())
    assert model.training
    assert model.blocks[0].norm1.training
    assert not model.norm.training
    assert all("forward" not in vars(module) for module in model.modules())
    assert all(not module._forward_pre_hooks and not module._forward_hooks for module in model.modules())


def test_dense_weights_and_hessians_of_a_finished_block_are_freed(monkeypatch: pytest.MonkeyPatch) -> None:
    model = toy(blocks=3)
    alive: list[weakref.ref[Hessian]] = []

    class Counted(Hessian):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            alive.append(weakref.ref(self))

    monkeypatch.setattr(factors, "Hessian", Counted)
    sizes, held = [], []

    def look(name: str, block: nn.Module) -> None:
        linear = [m for done in model.blocks for m in done.modules() if type(m) is nn.Linear]
        sizes.append(sum(module.weight.numel() for module in linear))
        held.append(sum(ref() is not None for ref in alive))

    layers = [module for module in model.blocks[0].modules() if isinstance(module, nn.Linear)]
    quantize_model(model, config(), samples(), events=listener(block_needed=look))
    assert [size * 3 for size in sizes] == [sizes[0] * 3, sizes[0] * 2, sizes[0]]
    assert held == [0, 0, 0]
    assert all(layer.weight.numel() == 0 for layer in layers)


def test_quantized_model_computes_with_the_weight_that_it_stores() -> None:
    model = toy()
    quantize_model(model, config(bits=3, sym=False), samples())
    dense = copy.deepcopy(model)
    for name in quantized_names(dense):
        parent, _, child = name.rpartition(".")
        setattr(dense.get_submodule(parent), child, model.get_submodule(name).dequantize(torch.float64))
    ids = torch.stack(samples(2, seed=9))
    with torch.no_grad():
        torch.testing.assert_close(model(ids), dense(ids))


@pytest.mark.parametrize("calibrated", [True, False])
def test_a_block_keeps_the_forward_that_its_instance_was_given(calibrated: bool) -> None:
    model, calls = toy(), []
    plain = model.blocks[1].forward

    def own(*args: Any, **kwargs: Any) -> Any:  # as accelerate's hooks do it
        calls.append(args)
        return plain(*args, **kwargs)

    model.blocks[1].forward = own
    quantize_model(model, config(), samples() if calibrated else None)
    assert model.blocks[1].forward is own
    assert "forward" not in vars(model.blocks[0])
    calls.clear()
    model(samples()[0][None])
    assert len(calls) == 1


def test_a_failed_run_leaves_forwards_as_they_were() -> None:
    model = toy()
    own = model.blocks[1].forward = model.blocks[1].forward
    with pytest.raises(RuntimeError, match="boom"):
        quantize_model(
            model,
            config(),
            samples(),
            events=listener(layer_done=lambda *_: (_ for _ in ()).throw(RuntimeError("boom"))),
        )
    assert vars(model.blocks[1])["forward"] is own
    assert "forward" not in vars(model.blocks[0])


class Skipping(Toy):
    """Only the first of its blocks runs."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        blocks, self.blocks = self.blocks, self.blocks[:1]
        try:
            return super().forward(input_ids, attention_mask)
        finally:
            self.blocks = blocks


def test_a_block_that_no_token_reaches_is_brought_and_finished_and_stays(caplog: pytest.LogCaptureFixture) -> None:
    model = Skipping()
    brought, finished = [], []
    report = quantize_model(
        model,
        config(),
        samples(),
        events=listener(
            block_needed=lambda name, block: brought.append(block), block_done=lambda name, block: finished.append(name)
        ),
    )
    assert brought == list(model.blocks)
    assert finished == ["blocks.0", "blocks.1"]
    assert {name.split(".")[1] for name in quantized_names(model)} == {"0"}
    assert set(report.config.dynamic or {}) == {
        rf"-:blocks\.1\.{name}$"
        for name in (*(rf"attn\.{key}" for key in "qkvo"), *(rf"mlp\.{key}" for key in ("gate", "up", "down")))
    }
    assert "blocks.1.attn.q: never called with a calibration token; kept in 16 bits" in caplog.text


@pytest.mark.parametrize("head", [True, False])
def test_a_run_that_quantizes_nothing_is_an_error(head: bool) -> None:
    model = toy()
    model.unused = nn.ModuleList(Mlp() for _ in range(2)).double()
    with pytest.raises(ConfigError, match=r"no layer was quantized: .* unused.0 to unused.1; .*block_name"):
        quantize_model(model, config(lm_head=head), samples(), options=RunOptions(block_name="unused"))


def test_a_model_that_wants_other_inputs_says_so_before_its_blocks() -> None:
    class Seeing(Toy):
        def forward(self, input_ids: Tensor, attention_mask: Any = None, pixels: Any = None) -> Tensor:
            if pixels is None:
                raise ValueError("You have to specify pixels")
            return super().forward(input_ids)

    with pytest.raises(CalibrationError, match=r"Seeing cannot be called with token ids alone \(You have to specify"):
        quantize_model(Seeing().double(), config(), samples())


def test_an_error_behind_the_first_block_is_not_taken_for_missing_inputs() -> None:
    model = toy()
    model.norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("of its own")))
    with pytest.raises(ValueError, match="^of its own$"):
        quantize_model(model, config(lm_head=True), samples())


def test_a_layer_that_is_linear_only_by_its_class_stays_and_is_named(caplog: pytest.LogCaptureFixture) -> None:
    class Doubling(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return 2 * super().forward(x)

    model = toy()
    for block in model.blocks:
        block.attn.o = Doubling(32, 32).double()
    report = quantize_model(model, config(), samples())
    assert len(report.layers) == 12
    assert isinstance(model.blocks[1].attn.o, Doubling)
    assert "blocks.0.attn.o (Doubling) and 1 layers like it stay in 16 bits" in caplog.text
