"""What a run leaves behind: dtypes, hooks, freed weights, blocks that were not reached, errors as they are."""

from __future__ import annotations

import copy
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import gptq_backend.model.layer_inputs as factors
from gptq_backend import CalibrationError, ConfigError, RunOptions, quantize_model
from gptq_backend.algorithm.hessian import Hessian
from tests.pipeline.hessians import config, quantized_names
from tests.toy import Mlp, Toy, listener, samples, toy


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


def test_inputs_of_a_wrong_shape_are_said_so_before_the_blocks() -> None:
    class Seeing(Toy):
        def forward(self, input_ids: Tensor, attention_mask: Any = None, pixels: Any = None) -> Tensor:
            torch.ones(4, 4) @ pixels
            return super().forward(input_ids)

    wrong = [{"input_ids": sample, "pixels": torch.ones(len(sample), 3)} for sample in samples()]
    with pytest.raises(CalibrationError, match=r"Seeing cannot be called with input_ids, pixels alone \(mat1 and mat2"):
        quantize_model(Seeing().double(), config(), wrong)


def test_memory_that_runs_out_before_the_blocks_is_not_taken_for_wrong_inputs() -> None:
    class Large(Toy):
        def forward(self, input_ids: Tensor, attention_mask: Any = None) -> Tensor:
            return torch.empty(1 << 60)

    with pytest.raises(RuntimeError, match="CPUAllocator|out of memory"):
        quantize_model(Large().double(), config(), samples())


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
