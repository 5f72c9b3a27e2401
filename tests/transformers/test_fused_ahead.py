"""Decoder layers that run ahead of their calls: one call per step, and nobody can tell from the results."""

from __future__ import annotations

import copy
import gc
import io
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from gptq_transformers.fused import ahead
from tests.kernels.checks import native
from tests.transformers.checkpoints import distance, ids, load, tiny, write
from tests.transformers.test_fused import CONFIG, decoded, fused, stock

pytestmark = native
LAYERS = 5


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA of several layers."""
    folder = tmp_path_factory.mktemp("llama")
    write(folder, tiny(num_hidden_layers=LAYERS), CONFIG)
    return folder


def step(model: Any, cache: DynamicCache, **kwargs: Any) -> Tensor:
    with torch.no_grad():
        return model(input_ids=ids(1), past_key_values=cache, **kwargs).logits


def begun(model: Any) -> DynamicCache:
    """A cache with room for more, of a model that has seen which layer follows which."""
    cache = DynamicCache()
    for _ in range(3):
        step(model, cache)
    return cache


def test_a_step_takes_one_call_and_gives_what_the_layers_give(folder: Path, runs: list[int]) -> None:
    model = load(folder)
    found = decoded(model, 12)
    assert runs == [LAYERS] * 11  # the first one makes room in the cache
    assert distance(found, decoded(stock(model), 12)) < 1e-5


@pytest.mark.parametrize("rows", [2, 8])
def test_several_tokens_and_padding_are_one_call_too(folder: Path, rows: int, runs: list[int]) -> None:
    model = load(folder)
    mask = torch.ones(2, 30, dtype=torch.long)
    mask[0, :3] = 0
    found = []
    for each in (model, stock(model)):
        cache, logits = DynamicCache(), []
        with torch.no_grad():
            for at, end in ((0, 6), (6, 7), (7, 7 + rows), (7 + rows, 8 + rows)):
                tokens = ids(30)[:, at:end]
                logits.append(each(input_ids=tokens, attention_mask=mask[:, :end], past_key_values=cache).logits)
        found.append(torch.cat(logits, dim=1)[:, 3:])
    assert runs == [LAYERS] * 2
    assert distance(*found) < 1e-5


def test_inference_mode_runs_ahead(folder: Path, runs: list[int]) -> None:
    model, cache = load(folder), DynamicCache()
    with torch.inference_mode():
        for _ in range(4):
            model(input_ids=ids(1), past_key_values=cache)
    assert runs == [LAYERS] * 2


@pytest.mark.parametrize("kind", ["in place", "another tensor", "of the layer behind"])
def test_a_hook_between_two_layers_is_heard(folder: Path, kind: str, runs: list[int]) -> None:
    model = load(folder)
    plain, results = stock(model), []
    for each in (model, plain):
        layers = each.model.layers
        if kind == "of the layer behind":
            layers[3].register_forward_pre_hook(lambda _, args: (args[0] * 1.5, *args[1:]))
        elif kind == "in place":
            layers[2].register_forward_hook(lambda *args: args[-1].mul_(1.5))
        else:
            layers[2].register_forward_hook(lambda *args: args[-1] * 1.5)
        cache = DynamicCache()
        results.append(torch.cat([step(each, cache) for _ in range(6)], dim=1))
    assert distance(*results) < 1e-5
    assert runs[-1] == 2  # of those behind the hook; before it three
    assert set(runs[-4:]) == {3, 2}


def test_a_hook_inside_is_heard_and_costs_only_its_own_layer_the_one_call(folder: Path, runs: list[int]) -> None:
    model, heard = load(folder), []
    cache = begun(model)
    hook = model.model.layers[2].mlp.register_forward_hook(lambda *_: heard.append(1))
    runs.clear()
    for _ in range(3):
        step(model, cache)
    assert len(heard) == 3
    assert runs == [LAYERS, 2, 2, 2, 2, 2]  # in vain, but once
    hook.remove()
    runs.clear()
    for _ in range(3):
        step(model, cache)
    assert runs[-1] == LAYERS


def test_layers_that_are_not_called_leave_the_cache_as_it_was(folder: Path) -> None:
    model = load(folder)
    cache = begun(model)
    held = [layer.keys for layer in cache.layers]
    before = [keys.clone() for keys in held]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    hook = model.model.layers[2].register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt):
        step(model, cache)
    hook.remove()
    lengths = [layer.get_seq_length() for layer in cache.layers]
    assert lengths == [4, 4, 4, 3, 3]
    assert all(torch.equal(a, b) for a, b in zip(held, before))
    assert all(layer.keys is keys for layer, keys in list(zip(cache.layers, held))[3:])


def test_new_weights_of_a_later_layer_are_read(folder: Path) -> None:
    model = load(folder)
    cache = begun(model)
    norm = model.model.layers[3].input_layernorm
    norm.weight = nn.Parameter(norm.weight.detach() * 2)
    plain = stock(model)
    other = DynamicCache()
    for _ in range(3):
        step(plain, other)
    for layer, wanted in zip(cache.layers, other.layers):  # as if it had been so from the start
        layer.keys, layer.values = wanted.keys, wanted.values
    for _ in range(3):
        assert distance(step(model, cache), step(plain, other)) < 1e-5


def test_a_cache_that_changes_within_a_step_is_read_anew(folder: Path) -> None:
    model = load(folder)
    plain, results = stock(model), []
    for each in (model, plain):
        cache = begun(each)

        def shorten(*_: Any, cache: DynamicCache = cache) -> None:
            cache.layers[3].keys = cache.layers[3].keys * 0.5

        hook = each.model.layers[1].register_forward_hook(shorten)
        results.append(torch.cat([step(each, cache) for _ in range(3)], dim=1))
        hook.remove()
    assert distance(*results) < 1e-5


def test_threads_and_models_in_turns_do_not_mix(folder: Path) -> None:
    model = load(folder)
    expected = [decoded(model, 10), decoded(model, 10)]
    found: list[Tensor] = []
    threads = [threading.Thread(target=lambda: found.append(decoded(model, 10))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 4
    assert all(torch.equal(each, expected[0]) for each in (*found, expected[1]))


def test_nothing_is_kept_of_a_step(folder: Path) -> None:
    model = load(folder)
    cache = begun(model)
    step(model, cache)
    held = weakref.ref(cache.layers[0].keys), weakref.ref(cache), weakref.ref(fused(model)[0])
    del cache, model
    gc.collect()
    assert [each() for each in held] == [None] * 3
    assert ahead._latest.output is None


def test_hidden_states_can_be_saved_and_loaded(folder: Path) -> None:
    model = load(folder)
    cache = begun(model)
    with torch.no_grad():
        states = model(input_ids=ids(1), past_key_values=cache, output_hidden_states=True).hidden_states
    buffer = io.BytesIO()
    torch.save(states, buffer)
    buffer.seek(0)
    loaded = torch.load(buffer, weights_only=True)
    assert len(loaded) == LAYERS + 1
    assert all(torch.equal(a, b) for a, b in zip(loaded, states))


@pytest.mark.parametrize("kind", ["keys", "mask", "angles"])
def test_a_hook_that_writes_in_place_within_a_step_is_heard(folder: Path, kind: str) -> None:
    model = load(folder)
    plain, results = stock(model), []
    for each in (model, plain):
        cache, found = DynamicCache(), []

        def write(_: nn.Module, args: Any, kwargs: Any, cache: DynamicCache = cache) -> None:
            if len(cache.layers) == LAYERS:
                keys = cache.layers[3].keys[:, :, :1]
                mask, angles = kwargs["attention_mask"][..., :1], kwargs["position_embeddings"][0]
                {"keys": keys.neg_, "mask": mask.zero_, "angles": angles.zero_}[kind]()

        each.model.layers[1].register_forward_pre_hook(write, with_kwargs=True)
        mask = torch.ones(2, 6, dtype=torch.long)
        mask[0, 0] = 0  # or there would be none
        with torch.no_grad():
            for at in range(6):
                token, seen = ids(6)[:, at, None], mask[:, : at + 1]
                found.append(each(input_ids=token, attention_mask=seen, past_key_values=cache).logits[1:])
        results.append(torch.cat(found, dim=1))
    assert distance(*results) < 1e-5


def test_layers_that_share_keys_and_values_do_not_overwrite_each_other(folder: Path) -> None:
    model = load(folder)
    results = []
    for each in (model, stock(model)):
        each.model.layers[3].self_attn.layer_idx = 2
        cache = DynamicCache()
        with torch.no_grad():
            found = [each(input_ids=token[:, None], past_key_values=cache).logits for token in ids(6).T]
        results.append(torch.cat(found, dim=1))
    assert distance(*results) < 1e-5


def test_shallow_copies_of_a_cache_may_be_continued_in_threads(folder: Path) -> None:
    """Also in the midst of a step."""
    model = load(folder)
    results = []
    for each in (model, stock(model)):
        cache = begun(each)
        branch = copy.copy(cache)
        branch.layers = [copy.copy(layer) for layer in cache.layers]

        def go_on(each: Any = each, branch: DynamicCache = branch) -> None:
            with torch.no_grad():
                each(input_ids=ids(2)[:, 1:], past_key_values=branch)

        threads = [threading.Thread(target=go_on)]

        def meanwhile(*_: Any, threads: list[threading.Thread] = threads) -> None:
            if threads:
                thread = threads.pop()
                thread.start()
                thread.join()

        hook = each.model.layers[1].register_forward_hook(meanwhile)
        first = step(each, cache)
        hook.remove()
        results.append(torch.cat([first, step(each, cache), step(each, branch)], dim=1))
    assert distance(*results) < 1e-5


def test_gradients_may_begin_at_what_a_layer_gave(folder: Path, runs: list[int]) -> None:
    model = load(folder)
    cache, found = begun(model), []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda *args: found.append(args[-1]))
    step(model, cache)
    assert runs[-1] == LAYERS
    factor = torch.ones(1, requires_grad=True)
    loss = (found[3] * factor).sum()
    found[1].add_(1)
    found[2].add_(found[2].clone() * factor)
    (loss + found[2].sum()).backward()
    assert factor.grad is not None
