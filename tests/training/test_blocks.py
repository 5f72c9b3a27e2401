"""Training block by block: what may change, what must not, and that an interrupted run goes on with the next block."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_backend import ConfigError, QuantizeConfig, QuantizeReport, RunOptions, quantize_model
from gptq_backend.distributed import Team
from gptq_backend.linear import QuantLinear
from gptq_backend.model.placement import Placement
from gptq_backend.model.progress import Progress
from gptq_backend.pipeline import layers
from gptq_backend.training import blocks as blockwise
from gptq_backend.training import scales as training
from gptq_backend.training.blocks import Example, train_block
from tests.toy import Mlp, SparseMlp, Toy, listener, samples, toy


def run(model: Toy | None = None, progress: Progress | None = None, **settings: Any) -> tuple[Toy, QuantizeReport]:
    model = toy(dtype=torch.float32) if model is None else model
    config = QuantizeConfig(**{"bits": 2, "group_size": 16, "block_epochs": 4, "quality": "fast", **settings})
    return model, quantize_model(model, config, samples(16), options=RunOptions(batch_size=2), progress=progress)


def block_outputs(model: Toy, ids: Tensor) -> list[Tensor]:
    found: list[Tensor] = []
    handles = [block.register_forward_hook(lambda *given: found.append(given[2])) for block in model.blocks]
    with torch.no_grad():
        model(ids)
    for handle in handles:
        handle.remove()
    return found


def test_what_is_reported_is_how_far_the_stored_blocks_are_from_the_original_ones() -> None:
    model, report = run()
    held_out = torch.stack(samples(16)[-2:])
    original = block_outputs(toy(dtype=torch.float32), held_out)
    for found, target, entry in zip(block_outputs(model, held_out), original, report.blocks, strict=True):
        assert entry.kept
        assert entry.after < 0.98 * entry.before
        error = float((found - target).square().sum() / target.square().sum())
        assert error == pytest.approx(entry.after, rel=1e-3)


def test_codes_and_everything_but_scales_and_vectors_of_a_block_stay() -> None:
    trained, plain = run()[0].state_dict(), run(block_epochs=0)[0].state_dict()
    assert trained.keys() == plain.keys()
    for key in (key for key in trained if not key.startswith("blocks.1")):  # whose inputs are others
        assert trained[key].dtype == plain[key].dtype
        changes = key.startswith("blocks.0") and (key.endswith("scales") or "norm" in key)
        assert torch.equal(trained[key], plain[key]) != changes, key


def test_a_training_that_does_not_help_is_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blockwise, "_RATE", 30.0)
    model, report = run()
    assert [each.kept for each in report.blocks] == [False, False]
    plain = run(block_epochs=0)[0].state_dict()
    assert all(torch.equal(tensor, plain[key]) for key, tensor in model.state_dict().items())


@pytest.mark.parametrize(
    "case", ["block", "second pass", "edges", "head", "experts", "unreached", "16 bits", "act-order", "parallel"]
)
def test_every_kind_of_run_can_be_trained(case: str) -> None:
    settings: dict[str, Any] = {
        "second pass": {"true_sequential": False},
        "edges": {"keep_edge_blocks": 1},
        "head": {"lm_head": True},
        "act-order": {"desc_act": True},
    }.get(case, {})
    mlp = {"experts": SparseMlp, "unreached": partial(SparseMlp, unreachable=True)}.get(case)
    shape: dict[str, Any] = {"blocks": 3, "parallel": case == "parallel"} | ({"mlp": mlp} if mlp else {})
    model = toy(dtype=torch.bfloat16 if case == "16 bits" else torch.float32, **shape)
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters() if parameter.dim() == 1}
    _, report = run(model, **settings)
    expected = ["blocks.1"] if case == "edges" else ["blocks.0", "blocks.1", "blocks.2"]
    assert [each.name for each in report.blocks] == expected
    assert sum(each.kept for each in report.blocks) > len(expected) / 2
    after = {name: parameter.dtype for name, parameter in model.named_parameters() if name in dtypes}
    assert after == dtypes
    assert isinstance(model.lm_head, QuantLinear) == (case == "head")
    assert all("forward" not in vars(module) for module in model.modules())
    assert model(torch.stack(samples(2))).isfinite().all()


def test_padding_does_not_count() -> None:
    block = nn.Sequential(nn.Linear(8, 8))
    x, target = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    junk = torch.where(mask.bool()[..., None], target, torch.tensor(1e6))
    errors = [Example(partial(block, x), each, mask).error().item() for each in (target, junk)]
    assert errors[0] == errors[1]
    assert Example(partial(block, x), junk, mask).energy() < 1e3


def test_targets_that_are_not_finite_change_nothing() -> None:
    block = toy(dtype=torch.float32)
    run(block, block_epochs=0)
    weights = {"attn.q": block.blocks[0].attn.q.quantized_weight()}
    before = copy.deepcopy(block.blocks[0].state_dict())
    inputs = torch.randn(1, 4, 32), torch.ones(4, 4, dtype=torch.bool)
    example = Example(partial(block.blocks[0], *inputs), torch.full((1, 4, 32), torch.nan), None)
    examples = {0: example, 1: example}
    vectors = block.blocks[0].norm1.parameters()
    report, found = train_block(
        block.blocks[0], "blocks.0", weights, vectors, examples, 1, lambda each: each.dtype, Team()
    )
    assert not report.kept
    assert not found
    assert all(torch.equal(tensor, before[key]) for key, tensor in block.blocks[0].state_dict().items())


@pytest.mark.parametrize("true_sequential", [True, False])
def test_an_interrupted_run_goes_on_with_the_next_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, true_sequential: bool
) -> None:
    settings = {"true_sequential": true_sequential, "dynamic": {r".*\.0\..*\.up": {"bits": 4}}}
    make = partial(toy, dtype=torch.float32, blocks=3, mlp=partial(SparseMlp, unreachable=True))
    whole, expected = run(make(), **settings)
    calls: list[str] = []
    quantize_weight = layers.quantize_weight

    def count(*args: Any, **kwargs: Any) -> Any:
        if kwargs["name"] == "blocks.2.attn.o" and not calls.count(kwargs["name"]):
            calls.append(kwargs["name"])
            raise KeyboardInterrupt
        calls.append(kwargs["name"])
        return quantize_weight(*args, **kwargs)

    monkeypatch.setattr(layers, "quantize_weight", count)
    with pytest.raises(KeyboardInterrupt):
        run(make(), Progress(tmp_path / "p"), **settings)
    calls.clear()
    calls.append("blocks.2.attn.o")
    seen: list[int] = []
    config = QuantizeConfig(bits=2, group_size=16, block_epochs=4, quality="fast", **settings)  # type: ignore[arg-type]
    resumed = make()
    report = quantize_model(
        resumed,
        config,
        samples(16),
        options=RunOptions(batch_size=2),
        progress=Progress(tmp_path / "p"),
        events=listener(layer_done=lambda entry, done, total: seen.append(done)),
    )
    assert all(name.startswith("blocks.2.") for name in calls)
    assert seen == [*range(1, len(expected.layers) + 1)]
    timeless = [[(each.name, each.loss, each.steps) for each in one.layers] for one in (expected, report)]
    assert timeless[0] == timeless[1]
    assert report.blocks == expected.blocks
    state = resumed.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in whole.state_dict().items())


@pytest.mark.parametrize("other", ["embedding", "block", "data", "settings", "dtype", "constants"])
def test_blocks_of_another_run_are_not_taken(tmp_path: Path, caplog: pytest.LogCaptureFixture, other: str) -> None:
    run(progress=Progress(tmp_path))
    model, data, bits = toy(dtype=torch.float32), samples(16), 2
    if other == "embedding":
        model.embed.weight.data[0, 0] += 0.01
    elif other == "block":
        model.blocks[0].mlp.down.weight.data[0, 0] += 0.01
    elif other == "data":
        data = samples(16, seed=3)
    elif other == "settings":
        bits = 3
    elif other == "dtype":
        model = model.bfloat16().float()
        run(copy.deepcopy(model).bfloat16(), Progress(tmp_path))
    else:
        model.config = PretrainedLike({"eps": 1e-2})  # type: ignore[assignment]
    config = QuantizeConfig(bits=bits, group_size=16, block_epochs=4, quality="fast")
    expected = copy.deepcopy(model)
    quantize_model(model, config, data, options=RunOptions(batch_size=2), progress=Progress(tmp_path))
    quantize_model(expected, config, data, options=RunOptions(batch_size=2))
    assert "starting over" in caplog.text
    state = model.state_dict()
    assert all(torch.equal(tensor, state[key]) for key, tensor in expected.state_dict().items())


def test_the_distillation_of_another_original_is_not_gone_on_with(tmp_path: Path) -> None:
    """Blocks do not tell originals apart that differ in the head only."""

    def make(factor: float) -> Toy:
        model = toy(dtype=torch.float32)
        model.lm_head.weight.data.mul_(factor)
        return model

    def quantized(factor: float, **options: Any) -> Toy:
        model = make(factor)
        config = QuantizeConfig(bits=2, group_size=16, quality="fast", distill_epochs=3)
        quantize_model(
            model, config, samples(16), options=RunOptions(batch_size=2), teacher=lambda: make(factor), **options
        )
        return model

    def interrupt(done: int, total: int, loss: float) -> None:
        if done == 17:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quantized(1.0, progress=Progress(tmp_path), events=listener(training_step=interrupt))
    seen: list[int] = []
    found = quantized(
        1.5, progress=Progress(tmp_path), events=listener(training_step=lambda *step: seen.append(step[0]))
    ).state_dict()
    assert seen[0] == 1
    assert all(torch.equal(tensor, found[key]) for key, tensor in quantized(1.5).state_dict().items())
    seen.clear()
    quantized(1.0, progress=Progress(tmp_path), events=listener(training_step=lambda *step: seen.append(step[0])))
    assert seen[0] == 17


class PretrainedLike(dict):  # type: ignore[type-arg]
    def to_dict(self) -> dict[str, float]:
        return dict(self)


class Scaling(Toy):
    """A model whose code works in place between blocks."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x, mask = self.embed(input_ids), torch.ones(24, 24, dtype=torch.bool).tril()
        for block in self.blocks:
            x = block(x, mask).mul_(0.5)
        return self.lm_head(self.norm(x))


class Looped(Toy):
    """A model that goes through its blocks twice."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        x, mask = self.embed(input_ids), torch.ones(24, 24, dtype=torch.bool).tril()
        for block in (*self.blocks, *self.blocks):
            x = block(x, mask)
        return self.lm_head(self.norm(x))


def test_what_the_model_does_in_place_between_blocks_leaves_the_targets_alone() -> None:
    torch.manual_seed(0)
    model = Scaling()
    original = copy.deepcopy(model)
    _, report = run(model)
    assert all(each.before < 0.2 for each in report.blocks)
    ids = torch.stack(samples(16)[-2:])
    found, target = block_outputs(model, ids)[0], block_outputs(original, ids)[0]
    assert float((found - target).square().sum() / target.square().sum()) == pytest.approx(
        report.blocks[0].after, rel=0.05
    )


@pytest.mark.parametrize("lm_head", [False, True])
def test_a_block_that_is_passed_twice_is_trained_once(lm_head: bool, tmp_path: Path) -> None:
    states = []
    for _ in range(2):  # the second goes on where the first was
        torch.manual_seed(0)
        model, report = run(Looped(), Progress(tmp_path), lm_head=lm_head)
        assert [each.name for each in report.blocks] == ["blocks.0", "blocks.1"]
        assert len(report.layers) == 14 + lm_head
        states.append(model.state_dict())
    assert all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())


def test_rules_in_another_order_are_other_settings(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    rules = {r".*\.q$": {"bits": 4}, r".*attn.*": {"bits": 8}}
    run(progress=Progress(tmp_path), dynamic=rules)
    model, _ = run(progress=Progress(tmp_path), dynamic=dict(reversed(rules.items())))
    assert "starting over" in caplog.text
    assert model.blocks[0].attn.q.spec.bits == 8


def test_gradients_of_large_outputs_do_not_vanish_in_float16(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "_computing", lambda parameter: parameter.dtype)
    model, _ = run(block_epochs=0)
    block, original = model.blocks[0].half(), toy(dtype=torch.float32).blocks[0].half()
    weights = {f"mlp.{name}": getattr(block.mlp, name).quantized_weight() for name in ("gate", "up", "down")}
    for name in ("gate", "up", "down"):
        setattr(block.mlp, name, getattr(original.mlp, name))
    inputs = [torch.randn(4, 512, 32).half() for _ in range(8)]
    for x in inputs:
        x[:, 0] = 600  # a token of massive activations
    mask = torch.ones(512, 512, dtype=torch.bool).tril()
    examples = {i: Example(partial(block, x, mask), original(x, mask).detach(), None) for i, x in enumerate(inputs)}
    assert examples[0].energy() > 1e7
    report, _ = train_block(block, "a", weights, [], examples, 4, lambda each: each.dtype, Team())
    assert report.after < 0.99 * report.before


def test_what_blocks_share_is_not_trained() -> None:
    model = toy(dtype=torch.float32)
    model.blocks[1].norm1 = model.blocks[0].norm1
    before = copy.deepcopy(model.blocks[0].norm1.state_dict())
    _, report = run(model)
    assert all(torch.equal(model.blocks[0].norm1.state_dict()[key], before[key]) for key in before)
    ids = torch.stack(samples(16)[-2:])
    original = toy(dtype=torch.float32)
    original.blocks[1].norm1 = original.blocks[0].norm1
    for found, target, entry in zip(
        block_outputs(model, ids), block_outputs(original, ids), report.blocks, strict=True
    ):
        assert float((found - target).square().sum() / target.square().sum()) == pytest.approx(entry.after, rel=1e-3)


def test_a_batch_that_reaches_nothing_trainable_is_no_error() -> None:
    block = nn.Sequential(nn.Linear(8, 8))
    model, _ = run(block_epochs=0)
    weights = {"attn.q": model.blocks[0].attn.q.quantized_weight()}
    examples = dict.fromkeys(range(2), Example(lambda: torch.zeros(1, 4, 8), torch.ones(1, 4, 8), None))
    container = nn.Module()
    container.attn = nn.Module()
    container.attn.q = block[0]
    report, _ = train_block(container, "a", weights, [], examples, 1, lambda each: each.dtype, Team())
    assert not report.kept


def test_biases_of_linear_layers_stay_and_get_no_gradients() -> None:
    model = toy(dtype=torch.float32)
    model.blocks[0].attn.extra = nn.Linear(32, 32)  # never called, so it stays
    before = copy.deepcopy(model.blocks[0].attn.extra.state_dict())
    run(model)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.blocks[0].attn.extra.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("mlp", [Mlp, SparseMlp])
def test_sixteen_bit_models_are_trained_in_their_own_types_where_they_compute_in_them(
    monkeypatch: pytest.MonkeyPatch, mlp: Any
) -> None:
    """As on a GPU: float32 norms would hand float32 to routers and other layers of 16 bits, which refuse it."""
    monkeypatch.setattr(training, "_computing", lambda parameter: parameter.dtype)
    monkeypatch.setattr(Placement, "bring", lambda self, tensors: None)
    model, teacher = (toy(dtype=torch.bfloat16, mlp=mlp) for _ in range(2))
    config = QuantizeConfig(bits=2, group_size=16, quality="best", block_epochs=6, correct_drift=False)
    report = quantize_model(model, config, samples(16), options=RunOptions(batch_size=2), teacher=lambda: teacher)
    assert sum(each.kept for each in report.blocks) >= (2 if mlp is Mlp else 1)  # 16 bits route tokens otherwise
    assert report.distillation is not None
    assert {p.dtype for p in model.parameters() if p.is_floating_point()} == {torch.bfloat16, torch.float16}


def test_inference_mode_of_the_caller_does_not_matter() -> None:
    model, teacher = toy(dtype=torch.float32), toy(dtype=torch.float32)
    expected = run(toy(dtype=torch.float32), block_epochs=1)[1]
    config = QuantizeConfig(bits=2, group_size=16, quality="fast", block_epochs=1, distill_epochs=1)
    with torch.inference_mode():
        report = quantize_model(model, config, samples(16), options=RunOptions(batch_size=2), teacher=lambda: teacher)
    assert report.blocks == expected.blocks
    assert report.distillation is not None


def test_a_model_that_cannot_be_trained_is_refused_before_the_work() -> None:
    with torch.inference_mode():
        model = toy(dtype=torch.float32)
    with pytest.raises(ConfigError, match="inference_mode"):
        run(model)
