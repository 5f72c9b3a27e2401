"""Decoder layers in few calls around what is called as it is: what others do to it, or to a dropout, is heard."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers.models.qwen3_moe")
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeDecoderLayer, Qwen3MoeSparseMoeBlock

from gptq_transformers.fused import fuse_layers
from tests.kernels.checks import native
from tests.transformers.checkpoints import VERSION_4, distance, ids, load, logits, tiny, write
from tests.transformers.test_fused import CONFIG, OTHER_MLPS, fused, stock

pytestmark = native


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture of experts."""
    folder = tmp_path_factory.mktemp("qwen3_moe")
    write(folder, tiny("qwen3_moe", **OTHER_MLPS["qwen3_moe"]), CONFIG)
    return folder


def test_modules_of_a_mixture_are_heard_and_its_routers_logits_are_given(folder: Path) -> None:
    model = load(folder)
    plain = stock(model)
    seen: list[Any] = []
    names = ["mlp", "mlp.gate", *([] if VERSION_4 else ["mlp.experts"])]  # a list that is not called in 4
    for name in names:
        module = model.model.layers[1].get_submodule(name)
        module.register_forward_hook(lambda module, args, output: seen.append(module))
    with torch.no_grad():
        found, expected = (each(ids(9), output_router_logits=True) for each in (model, plain))
    assert len(seen) == len(names)
    assert fused(model)[1].forward.parts is not None
    assert len(found.router_logits) == len(expected.router_logits) == 2
    for a, b in zip((found.logits, *found.router_logits), (expected.logits, *expected.router_logits)):
        assert distance(a, b) < 1e-5


def test_a_forward_that_somebody_gave_a_mixture_before_stays(folder: Path) -> None:
    """accelerate's, which brings its weights."""
    model, heard = stock(load(folder)), []
    mlp = model.model.layers[0].mlp
    own = mlp.forward
    mlp.forward = lambda x: (heard.append(1), own(x))[1]
    assert fuse_layers(model) == 2
    heard.clear()
    logits(model)
    assert heard


class Scaled(Qwen3MoeSparseMoeBlock):
    def forward(self, hidden_states: Tensor, factor: float = 1.0) -> Tensor:
        return super().forward(hidden_states) * factor


class Scaling(Qwen3MoeDecoderLayer):
    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        h = hidden_states + attended
        return h + self.mlp(self.post_attention_layernorm(h), 2.0)


@pytest.mark.skipif(VERSION_4, reason="mixtures of transformers 4 return more")
def test_a_layer_that_gives_its_mixture_more_than_the_hidden_states_stays_as_it_is(folder: Path) -> None:
    model = stock(load(folder))
    layer = model.model.layers[0]
    layer.__class__, layer.mlp.__class__ = Scaling, Scaled
    expected = logits(model)
    assert fuse_layers(model) == 1
    assert distance(logits(model), expected) < 1e-5


@pytest.mark.skipif(VERSION_4, reason="these layers of transformers 4 return more")
@pytest.mark.parametrize(
    ("family", "name", "rate"), [("stablelm", "dropout", "hidden_dropout"), ("phi", "resid_dropout", "resid_pdrop")]
)
def test_a_dropout_of_the_layer_is_heard(family: str, name: str, rate: str, tmp_path: Path) -> None:
    """Alone, as for estimates of uncertainty, and its hooks."""
    write(tmp_path, tiny(family, **{rate: 0.5}), CONFIG)
    model, heard, found = load(tmp_path), [], []
    assert len(fused(model)) == 2
    for each in (model, stock(model)):
        dropout = each.model.layers[0].get_submodule(name).train()
        torch.manual_seed(0)
        found.append(logits(each))
        dropout.eval()
    assert distance(*found) < 1e-5
    model.model.layers[0].get_submodule(name).register_forward_hook(lambda *_: heard.append(1))
    logits(model)
    assert heard


@pytest.mark.skipif(VERSION_4, reason="layers of gpt-oss run module by module")
def test_sinks_that_change_are_read(tmp_path: Path) -> None:
    """In place, as new tensors, and as some that the calls do not read."""
    write(tmp_path, tiny("gpt_oss", **OTHER_MLPS["gpt_oss"]), CONFIG)
    model = load(tmp_path)
    attention, found = fused(model)[0].self_attn, [logits(model)]
    with torch.no_grad():
        attention.sinks += 3
    found.append(logits(model))
    attention.sinks.data = torch.tensor([5.0, -1.0])
    found.append(logits(model))
    attention.sinks = nn.Parameter(torch.tensor([8.0, 0.0, -2.0, 0.0])[::2])
    found.append(logits(model))
    assert distance(found[-1], logits(stock(model))) < 1e-5
    for before, after in itertools.pairwise(found):
        assert distance(after, before) > 1e-4
