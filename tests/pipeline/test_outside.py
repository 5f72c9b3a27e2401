"""Large embeddings and heads are in float32 while passes use them, and wait as they are stored meanwhile."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from gptq_backend import QuantizeConfig, QuantizeReport, quantize_model
from gptq_backend.pipeline import outside
from tests.toy import Toy, listener, samples, toy

CONFIG: dict[str, Any] = {"bits": 4, "group_size": 16}


class Headed(Toy):
    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def model(**kwargs: Any) -> Headed:
    torch.manual_seed(0)
    return Headed(**kwargs).to(torch.bfloat16)


def run(headed: Headed, **settings: Any) -> tuple[dict[str, torch.Tensor], QuantizeReport, list[tuple[Any, Any]]]:
    seen: list[tuple[Any, Any]] = []

    def look(*_: Any) -> None:
        seen.append((headed.embed.weight.dtype, headed.lm_head.weight.dtype))

    report = quantize_model(headed, QuantizeConfig(**CONFIG, **settings), samples(), events=listener(layer_done=look))
    return headed.state_dict(), report, seen


@pytest.mark.parametrize("settings", [{}, {"lm_head": True}, {"embed_bits": 8, "embed_group_size": 16}])
@pytest.mark.parametrize("tied", [False, True])
def test_the_result_does_not_depend_on_what_waits(
    monkeypatch: pytest.MonkeyPatch, tied: bool, settings: dict[str, Any]
) -> None:
    expected, report, _ = run(model(tied=tied), **settings)
    monkeypatch.setattr(outside, "_LARGE_BYTES", 1)
    found, again, _ = run(model(tied=tied), **settings)
    assert [layer.loss for layer in again.layers] == [layer.loss for layer in report.layers]
    assert found.keys() == expected.keys()
    assert all(
        torch.equal(tensor, found[name]) and tensor.dtype == found[name].dtype for name, tensor in expected.items()
    )


def test_an_embedding_waits_while_blocks_are_quantized(monkeypatch: pytest.MonkeyPatch) -> None:
    *_, seen = run(model())
    assert {*seen} == {(torch.float32, torch.float32)}
    monkeypatch.setattr(outside, "_LARGE_BYTES", 1)
    *_, seen = run(model())
    assert {*seen} == {(torch.bfloat16, torch.bfloat16)}


def test_an_embedding_that_is_called_between_blocks_waits_again(monkeypatch: pytest.MonkeyPatch) -> None:
    class Twice(Headed):
        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            x, mask = self.embed(input_ids), torch.ones(24, 24, dtype=torch.bool).tril()
            x = self.blocks[0](x, mask) + self.embed(input_ids)
            return self.lm_head(self.norm(self.blocks[2](self.blocks[1](x, mask), mask)))

    monkeypatch.setattr(outside, "_LARGE_BYTES", 1)
    torch.manual_seed(0)
    *_, seen = run(Twice(blocks=3).to(torch.bfloat16))
    assert {*seen} == {(torch.bfloat16, torch.bfloat16)}


def test_a_head_that_no_pass_comes_to_is_never_brought(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "_LARGE_BYTES", 1)
    headed = model()
    before = headed.lm_head.weight.data_ptr()
    run(headed)
    assert headed.lm_head.weight.data_ptr() == before


def test_hooks_are_gone_afterwards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outside, "_LARGE_BYTES", 1)
    headed = model()
    run(headed)
    assert not any(module._forward_pre_hooks for module in headed.modules())
    failed = toy(dtype=torch.bfloat16)
    with pytest.raises(RuntimeError, match="boom"):
        quantize_model(
            failed,
            QuantizeConfig(**CONFIG),
            samples(),
            events=listener(layer_done=lambda *_: (_ for _ in ()).throw(RuntimeError("boom"))),
        )
    assert not any(module._forward_pre_hooks for module in failed.modules())
