"""A model's loop over its layers calls one thing, where its source shows that it only calls them."""

from __future__ import annotations

import copy
import inspect
import pickle
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.models.llama import modeling_llama

from gptq_transformers.fused import fuse_layers
from gptq_transformers.fused.forward import FusedForward
from gptq_transformers.fused.stack import LayerList, Stack
from tests.kernels.checks import native
from tests.transformers.checkpoints import VERSION_4, distance, ids, load, tiny, write
from tests.transformers.test_fused import CONFIG, decoded, stock
from tests.transformers.test_fused_ahead import begun, step

pytestmark = native
LAYERS = 4
FAMILIES = ["llama", "qwen3", "phi3"] + ([] if VERSION_4 else ["granite"])  # whose loop does more in transformers 4.57


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write(folder, tiny(num_hidden_layers=LAYERS), CONFIG)
    return folder


def assert_alike(model: Any, called: list[Any], expected: int) -> None:
    """That steps give what the modules give, and how many layers each of them calls in the end."""
    plain = stock(model)
    cache, other = begun(model), begun(plain)
    for _ in range(3):
        called.clear()
        assert distance(step(model, cache), step(plain, other)) < 1e-5
    assert len(called) == expected


@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_calls_no_layer_and_gives_what_the_layers_give(family: str, tmp_path: Path, called: list[Any]) -> None:
    write(tmp_path, tiny(family, num_hidden_layers=LAYERS), CONFIG)
    model = load(tmp_path)
    found = decoded(model, 12)
    assert len(called) == 3 * LAYERS  # in the prompt, to make room in the cache, and to find which follows which
    assert distance(found, decoded(stock(model), 12)) < 1e-5


@pytest.mark.skipif(VERSION_4, reason="its loop does more there")
def test_layers_that_get_different_masks_are_called_one_by_one(tmp_path: Path, called: list[Any]) -> None:
    kinds = ["sliding_attention", "full_attention"] * (LAYERS // 2)
    write(
        tmp_path,
        tiny("qwen3", num_hidden_layers=LAYERS, layer_types=kinds, sliding_window=8, use_sliding_window=True),
        CONFIG,
    )
    model = load(tmp_path)
    assert isinstance(model.model.layers, LayerList)
    assert distance(decoded(model, 12), decoded(stock(model), 12)) < 1e-5
    assert len(called) == 13 * LAYERS


@pytest.mark.parametrize("at", [0, 2, LAYERS - 1])
@pytest.mark.parametrize("kind", ["before", "behind", "inside"])
def test_a_hook_of_any_layer_is_heard_and_removed(folder: Path, at: int, kind: str, called: list[Any]) -> None:
    model, heard = load(folder), []
    layer = model.model.layers[at]
    cache = begun(model)
    step(model, cache)
    called.clear()
    if kind == "before":
        hook = layer.register_forward_pre_hook(lambda *_: heard.append(1))
    elif kind == "behind":
        hook = layer.register_forward_hook(lambda *_: heard.append(1))
    else:
        hook = layer.mlp.down_proj.register_forward_hook(lambda *_: heard.append(1))
    for _ in range(3):
        step(model, cache)
    assert len(heard) == 3
    assert len(called) == 3 * LAYERS
    hook.remove()
    assert_alike(model, called, 0)


def test_a_hook_of_all_modules_is_heard(folder: Path) -> None:
    model, heard = load(folder), []
    cache = begun(model)
    hook = nn.modules.module.register_module_forward_hook(lambda module, *_: heard.append(type(module).__name__))
    step(model, cache)
    hook.remove()
    assert heard.count("LlamaDecoderLayer") == LAYERS


def test_hidden_states_and_attentions_that_are_asked_for_are_those_of_all_layers(folder: Path) -> None:
    model = load(folder, attn_implementation="eager")
    plain = stock(model)
    found = []
    for each in (model, plain):
        cache = begun(each)
        step(each, cache)
        with torch.no_grad():
            found.append(
                each(input_ids=ids(1), past_key_values=cache, output_hidden_states=True, output_attentions=True)
            )
        step(each, cache)
    assert len(found[0].hidden_states) == len(found[1].hidden_states) == LAYERS + 1
    assert len(found[0].attentions) == LAYERS
    for ours, others in zip(*((*each.hidden_states, *each.attentions) for each in found)):
        assert distance(ours, others) < 1e-5


@pytest.mark.skipif(VERSION_4, reason="it leaves no hooks there")
def test_after_hidden_states_were_asked_for_layers_are_called_one_by_one(folder: Path, called: list[Any]) -> None:
    model = load(folder)
    cache = begun(model)
    step(model, cache)
    step(model, cache, output_hidden_states=True)
    assert_alike(model, called, LAYERS)  # transformers leaves its hooks


class Counting:
    """Stands in for ``__call__`` of a class."""

    def __init__(self, call: Callable[..., Any]) -> None:
        self.call, self.count = call, 0

    def function(self) -> Callable[..., Any]:
        def counted(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
            self.count += isinstance(module, modeling_llama.LlamaDecoderLayer)
            return self.call(module, *args, **kwargs)

        return counted


@pytest.mark.parametrize("kind", [modeling_llama.LlamaDecoderLayer, nn.Module, GradientCheckpointingLayer])
@pytest.mark.parametrize("early", [True, False])
def test_who_patches_calls_of_layers_hears_each(
    folder: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, early: bool
) -> None:
    model, counting = load(folder), Counting(kind.__call__)
    cache = DynamicCache() if early else begun(model)
    monkeypatch.setattr(kind, "__call__", counting.function())
    for _ in range(5):
        step(model, cache)
    assert counting.count == 5 * LAYERS


def test_a_layer_class_with_calls_of_its_own_is_called(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    counting = Counting(modeling_llama.LlamaDecoderLayer.__call__)
    own = type("Own", (modeling_llama.LlamaDecoderLayer,), {"__call__": counting.function()})
    monkeypatch.setattr(modeling_llama, "LlamaDecoderLayer", own)
    model = load(folder)
    monkeypatch.undo()
    begun(model)
    counting.count = 0
    step(model, begun(model))
    assert counting.count == 4 * LAYERS


def test_gradients_flow_through_each_layer(folder: Path, called: list[Any]) -> None:
    model = load(folder)
    begun(model)
    called.clear()
    model(input_ids=ids(1)).logits.sum().backward()
    assert called == list(model.model.layers)
    assert all(layer.input_layernorm.weight.grad is not None for layer in model.model.layers)


def test_a_layer_that_the_user_replaced_or_patched_is_called(folder: Path, called: list[Any]) -> None:
    class Doubling(nn.Module):
        def forward(self, hidden_states: Tensor, **_: Any) -> Tensor:
            return hidden_states * 2

    model = load(folder)
    begun(model)
    model.model.layers[2] = Doubling()
    assert_alike(model, called, LAYERS - 1)
    model = load(folder)
    begun(model)
    model.model.layers[2].forward = lambda hidden_states, **_: hidden_states * 2
    plain = copy.deepcopy(model)
    for layer in plain.model.layers:
        if isinstance(layer.forward, FusedForward):
            del layer.forward
    assert distance(decoded(model), decoded(plain)) < 1e-5


@pytest.mark.parametrize("count", [1, 2, LAYERS])
def test_fewer_layers_are_run_where_the_list_or_the_setting_says_so(folder: Path, count: int) -> None:
    for change in (
        lambda model: setattr(model.model, "layers", model.model.layers[:count]),
        lambda model: setattr(model.model.config, "num_hidden_layers", count),
        lambda model: model.model.layers.__delitem__(slice(count, None)),
    ):
        model = load(folder)
        begun(model)
        change(model)
        assert distance(decoded(model), decoded(stock(model))) < 1e-5


def test_the_list_is_an_ordinary_one_for_everyone_else(folder: Path) -> None:
    model = load(folder)
    plain, layers = stock(model), model.model.layers
    assert type(plain.model.layers) is nn.ModuleList
    assert isinstance(layers, nn.ModuleList)
    assert len(layers) == LAYERS
    with torch.no_grad():
        assert [id(each) for each in layers] == [id(layers[i]) for i in range(LAYERS)]
        assert type(layers[1:]) is nn.ModuleList
        assert [id(each) for each in layers[1:]] == [id(layers[i]) for i in range(1, LAYERS)]
    assert list(model.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert repr(model) == repr(plain)
    assert set(dir(layers)) - set(dir(plain.model.layers)) == {"_loop", "_stack", "_stack_for"}
    assert len(list(model.modules())) == len(list(plain.modules()))


def test_copies_and_pickles_have_a_loop_of_their_own(folder: Path, called: list[Any]) -> None:
    model = load(folder)
    begun(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        with torch.no_grad():
            other.lm_head.weight.mul_(2)
        assert_alike(other, called, 0)
        assert distance(step(other, DynamicCache()), 2 * step(model, DynamicCache())) < 1e-5


def test_what_stands_for_layers_can_be_copied(folder: Path) -> None:
    stack = Stack(list(load(folder).model.layers))
    assert copy.copy(stack).layers is stack.layers
    assert len(pickle.loads(pickle.dumps(stack)).layers) == LAYERS
    with pytest.raises(AttributeError):
        stack.__wrapped__  # noqa: B018


def test_a_copy_does_not_read_the_source_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    layers = load(folder).model.layers
    monkeypatch.setattr(inspect, "findsource", None)
    assert vars(copy.deepcopy(layers))["_loop"] is vars(layers)["_loop"]


def test_after_an_exception_inside_a_layer_steps_go_on(folder: Path, called: list[Any]) -> None:
    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    model = load(folder)
    results = []
    for each in (model, stock(model)):
        cache = begun(each)
        step(each, cache)
        hook = each.model.layers[2].mlp.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt):
            step(each, cache)
        hook.remove()
        cache.crop(4)  # some layers have seen the token
        results.append(torch.cat([step(each, cache) for _ in range(4)], dim=1))
    assert distance(*results) < 1e-5
    assert_alike(model, called, 0)


def test_threads_generate_at_the_same_time(folder: Path) -> None:
    model = load(folder)
    prompts = [ids(6)[:1], ids(9)]
    arguments = [{"attention_mask": torch.ones_like(each), "max_new_tokens": 24} for each in prompts]
    plain = stock(model)
    expected = [plain.generate(each, do_sample=False, **more) for each, more in zip(prompts, arguments)]
    wrong: list[int] = []

    def generate(i: int) -> None:
        for _ in range(3):
            if not torch.equal(model.generate(prompts[i], do_sample=False, **arguments[i]), expected[i]):
                wrong.append(i)

    threads = [threading.Thread(target=generate, args=(i,)) for i in range(len(prompts))]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert not wrong


def test_an_assistant_gives_the_same_tokens(folder: Path, tmp_path: Path) -> None:
    write(tmp_path, tiny(num_hidden_layers=2), CONFIG)
    model, prompt = load(folder), ids(12)[:1]
    arguments = {"attention_mask": torch.ones_like(prompt), "max_new_tokens": 20, "do_sample": False}
    found = model.generate(prompt, assistant_model=load(tmp_path), **arguments)
    assert torch.equal(found, stock(model).generate(prompt, **arguments))


def test_it_is_compiled_without_a_break(folder: Path) -> None:
    model = load(folder)
    expected = decoded(model, 1)[:, :9]
    with torch.no_grad():
        found = torch.compile(model, backend="eager", fullgraph=True)(input_ids=ids(9), use_cache=False).logits
    assert distance(found, expected) < 1e-5


def test_it_is_exported(folder: Path) -> None:
    model = load(folder)
    expected = decoded(model, 1)[:, :9]
    with torch.no_grad():
        exported = torch.export.export(model, (), {"input_ids": ids(9), "use_cache": False}, strict=True)
        found = exported.module()(input_ids=ids(9), use_cache=False).logits
    assert distance(found, expected) < 1e-5


def test_an_exported_model_can_be_used_copied_and_saved(folder: Path, called: list[Any]) -> None:
    model = load(folder)
    stored = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with torch.no_grad():
        torch.export.export(model, (), {"input_ids": ids(9), "use_cache": False}, strict=False)
    assert_alike(model, called, 0)
    for each in (model, copy.deepcopy(model)):
        assert all(torch.equal(tensor, stored[name]) for name, tensor in each.state_dict().items())


def keeping(states: list[Tensor]) -> Callable[..., Any]:
    """A ``forward`` of a LLaMA whose loop does more."""

    def forward(self: Any, input_ids: Tensor, past_key_values: Any = None, **_: Any) -> Any:
        hidden_states = self.embed_tokens(input_ids)
        seen = 0 if past_key_values is None else past_key_values.get_seq_length()
        position_ids = torch.arange(seen, seen + input_ids.shape[1])[None]
        angles = self.rotary_emb(hidden_states, position_ids)
        for layer in self.layers[: self.config.num_hidden_layers]:
            hidden_states = layer(hidden_states, position_embeddings=angles, past_key_values=past_key_values)
            states.append(hidden_states)
        return modeling_llama.BaseModelOutputWithPast(self.norm(hidden_states), past_key_values)

    return forward


def test_a_model_whose_loop_does_more_keeps_it(folder: Path, called: list[Any]) -> None:
    model, states, others = stock(load(folder)), list[Tensor](), list[Tensor]()
    kind = type(model.model)
    model.model.__class__ = type("Keeping", (kind,), {"forward": keeping(states)})
    assert fuse_layers(model) == LAYERS
    assert type(model.model.layers) is nn.ModuleList
    model = load(folder)  # one whose loop was proved, and then is another
    model.model.__class__ = type("Keeping", (kind,), {"forward": keeping(states)})
    plain = stock(model)
    plain.model.__class__ = type("Keeping", (kind,), {"forward": keeping(others)})
    cache, other = DynamicCache(), DynamicCache()
    for _ in range(4):
        states.clear(), others.clear(), called.clear()
        step(model, cache), step(plain, other)
        assert len(states) == len(called) == LAYERS
        assert all(distance(*pair) < 1e-5 for pair in zip(states, others))
