"""What a loop that calls no layer does to the cache, and others to it."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.kernels.checks import native
from tests.transformers.checkpoints import distance, load, tiny, write
from tests.transformers.test_fused import CONFIG, stock
from tests.transformers.test_fused_ahead import begun, step
from tests.transformers.test_fused_loop import LAYERS, assert_alike

pytestmark = native


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write(folder, tiny(num_hidden_layers=LAYERS), CONFIG)
    return folder


def test_a_cache_may_be_copied_between_steps(folder: Path, called: list[Any]) -> None:
    model = load(folder)
    results = []
    for each in (model, stock(model)):
        cache = begun(each)
        step(each, cache)
        branch, shallow = copy.deepcopy(cache), copy.copy(cache)
        shallow.layers = [copy.copy(layer) for layer in cache.layers]
        found = []
        for other in (branch, shallow, cache, pickle.loads(pickle.dumps(cache))):
            found += [step(each, other) for _ in range(2)]
        results.append(torch.cat(found, dim=1))
    assert distance(*results) < 1e-5


def test_keys_and_values_may_move_to_shared_memory(folder: Path) -> None:
    model = load(folder)
    results = []
    for each in (model, stock(model)):
        cache = begun(each)
        step(each, cache)
        for layer in cache.layers:
            layer.keys.share_memory_(), layer.values.share_memory_()
        results.append(torch.cat([step(each, cache) for _ in range(8)], dim=1))
    assert distance(*results) < 1e-5


@pytest.mark.parametrize("change", ["crop", "other keys", "another layer", "reorder"])
def test_what_others_do_to_the_cache_is_read(folder: Path, change: str) -> None:
    model = load(folder)
    results = []
    for each in (model, stock(model)):
        cache = begun(each)
        step(each, cache)
        if change == "crop":
            cache.crop(-2)
        elif change == "other keys":
            cache.layers[1].keys = cache.layers[1].keys * 0.5
        elif change == "another layer":
            cache.layers[2] = copy.deepcopy(cache.layers[1])
        else:
            cache.reorder_cache(torch.tensor([1, 0]))
        results.append(torch.cat([step(each, cache) for _ in range(3)], dim=1))
    assert distance(*results) < 1e-5


def test_an_exception_in_a_step_leaves_the_cache_as_it_was(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = load(folder)
    cache = begun(model)
    step(model, cache)
    lengths = [layer.get_seq_length() for layer in cache.layers]

    def stop(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("gptq_backend.kernels.cpu_layers.Results", stop)
        with pytest.raises(KeyboardInterrupt):
            step(model, cache)
    assert [layer.get_seq_length() for layer in cache.layers] == lengths


def test_inference_mode_may_be_switched_between_steps(folder: Path, called: list[Any]) -> None:
    model = load(folder)
    plain = stock(model)
    cache, other = begun(model), begun(plain)
    for i in range(8):
        with torch.inference_mode(i % 4 > 1):
            assert distance(step(model, cache), step(plain, other)) < 1e-5
    assert_alike(model, called, 0)
