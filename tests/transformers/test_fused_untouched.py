"""Decoder layers in few calls: what others do to a model is heard, and nothing of it is kept or harmed."""

from __future__ import annotations

import copy
import gc
import inspect
import io
import os
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import AttentionInterface
from transformers.models.llama import modeling_llama

from gptq_backend import QuantizeConfig, QuantLinear, quantize_model
from gptq_transformers.fused import fuse_layers, match
from gptq_transformers.fused.calls import Calls
from gptq_transformers.hf_quantizer import attach
from tests.kernels.checks import native
from tests.transformers.checkpoints import VERSION_4, distance, ids, load, logits, tiny, write
from tests.transformers.test_fused import CONFIG, decoded, fused, stock

pytestmark = native


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA."""
    folder = tmp_path_factory.mktemp("llama")
    write(folder, tiny(), CONFIG)
    return folder


@pytest.fixture
def runs(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """One entry for each layer that ran in few calls."""
    counted: list[int] = []
    original = Calls.run

    def run(self: Calls, *args: Any, **kwargs: Any) -> Tensor:
        counted.append(1)
        return original(self, *args, **kwargs)

    monkeypatch.setattr(Calls, "run", run)
    return counted


@pytest.mark.parametrize("name", ["LlamaAttention", "LlamaMLP", "LlamaRMSNorm", "LlamaDecoderLayer"])
def test_a_patched_class_is_heard(folder: Path, name: str, monkeypatch: pytest.MonkeyPatch, runs: list[int]) -> None:
    model, heard = load(folder), []
    kind = getattr(modeling_llama, name)
    original = kind.forward

    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        heard.append(1)
        return original(self, *args, **kwargs)

    runs.clear()
    with monkeypatch.context() as patch:
        patch.setattr(kind, "forward", patched)
        logits(model)
        assert heard
        assert not runs
        twin = copy.deepcopy(model)  # made from what was patched: it stays with its own code
        assert not fused(load(folder))  # that one too, though it computes the same
    runs.clear()
    logits(model)
    assert len(runs) == 2
    logits(twin)
    assert len(runs) == 2


def test_patched_functions_are_heard(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heard: list[str] = []

    def telling(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: (heard.append(name), function(*args, **kwargs))[1]

    for owner, name, implementation in (
        (modeling_llama, "apply_rotary_pos_emb", "sdpa"),
        (modeling_llama, "eager_attention_forward", "eager"),
        (nn.functional, "scaled_dot_product_attention", "sdpa"),
    ):
        model = load(folder, attn_implementation=implementation)
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, telling(name, getattr(owner, name)))
            logits(model, ids(1))
        assert heard.pop() == name
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", telling("sdpa", sdpa_attention_forward))
    logits(load(folder), ids(1))
    assert heard.pop() == "sdpa"


@pytest.mark.parametrize("owner", [DynamicCache, DynamicLayer, None], ids=["cache", "layer", "one cache"])
def test_a_patched_cache_is_heard(folder: Path, owner: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, heard, cache = load(folder), [], DynamicCache()
    original = (owner or cache).update
    monkeypatch.setattr(owner or cache, "update", lambda *args: (heard.append(1), original(*args))[1])
    with torch.no_grad():
        for _ in range(3):
            model(input_ids=ids(1), past_key_values=cache)
    assert len(heard) == 6


@pytest.mark.parametrize("path", ["self_attn", "mlp", "mlp.act_fn", "input_layernorm", "self_attn.k_proj"])
@pytest.mark.parametrize("kind", ["forward", "forward_pre"])
def test_hooks_of_every_module_are_called(folder: Path, path: str, kind: str) -> None:
    model, heard = load(folder), []
    module = fused(model)[0].get_submodule(path)
    getattr(module, f"register_{kind}_hook")(lambda *_: heard.append(1), with_kwargs=True)
    logits(model)
    assert heard


@pytest.mark.parametrize(
    ("path", "name", "value"),
    [("self_attn", "head_dim", 16), ("input_layernorm", "variance_epsilon", 10.0), ("mlp", "act_fn", nn.GELU())],
)
def test_a_setting_that_changes_is_read(folder: Path, path: str, name: str, value: Any) -> None:
    model = load(folder)
    before, plain = logits(model), stock(model)
    found = []
    for each in (model, plain):
        setattr(each.model.layers[1].get_submodule(path), name, value)
        try:
            found.append(logits(each))
        except Exception as error:
            found.append(type(error))
    if isinstance(found[0], Tensor):
        assert distance(found[0], found[1]) < 1e-5
        assert distance(found[0], before) > 1e-3
    else:
        assert found[0] is found[1]


def test_gradients_reach_a_cache_that_wants_them(folder: Path) -> None:
    """A learned prefix in front of a frozen model."""
    model, gradients = load(folder).requires_grad_(False), []
    for each in (model, stock(model)):
        prefix = torch.ones(2, 1, 3, 32).requires_grad_()
        cache = DynamicCache()
        for index in range(2):
            cache.update(prefix, prefix, index)
        each(input_ids=ids(2), past_key_values=cache).logits.sum().backward()
        gradients.append(prefix.grad)
    assert distance(*gradients) < 1e-5


def test_parameters_that_are_swapped_for_a_call_are_read(folder: Path) -> None:
    model = load(folder)
    before = logits(model)
    other = {"model.layers.0.input_layernorm.weight": torch.full((64,), 2.0)}
    with torch.no_grad():
        found, expected = (torch.func.functional_call(m, other, (ids(),)).logits for m in (model, stock(model)))
        mapped = torch.vmap(lambda x: model(inputs_embeds=x).logits)(model.get_input_embeddings()(ids())[:, None])
    assert distance(found, expected) < 1e-5
    assert distance(mapped[:, 0], before) < 1e-5
    assert distance(logits(model), before) < 1e-6


def test_scales_that_are_swapped_or_set_are_read(folder: Path) -> None:
    model = load(folder)
    plain = stock(model)
    name = "model.layers.0.mlp.up_proj.scales"
    before, scales = logits(model), model.get_parameter(name).detach() * 2
    with torch.no_grad():
        swapped = [torch.func.functional_call(each, {name: scales}, (ids(),)).logits for each in (model, plain)]
    for each in (model, plain):
        each.get_parameter(name).data = scales
    assert distance(*swapped) < 1e-5
    assert distance(logits(model), logits(plain)) < 1e-5
    assert distance(logits(model), before) > 1e-3


def test_inputs_of_wrong_shapes_are_refused_by_the_layers_own_code(folder: Path) -> None:
    """They would be read past their end."""
    model = load(folder)
    layer, rotary = fused(model)[0], model.model.rotary_emb
    for shape, positions in (((1, 3, 32), 3), ((1, 3, 64), 5), ((3, 64), 3)):
        angles = rotary(torch.randn(1, positions, 64), torch.arange(positions)[None])
        with torch.no_grad(), pytest.raises(RuntimeError):
            layer(torch.randn(shape), position_embeddings=angles)
    cache = DynamicCache()
    with torch.no_grad(), pytest.raises(RuntimeError):
        model(input_ids=ids(3)[:1], past_key_values=cache)
        model(input_ids=ids(1), past_key_values=cache)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_short_padded_prompts_and_masks_of_four_dimensions(folder: Path, implementation: str) -> None:
    model = load(folder, attn_implementation=implementation)
    plain, mask = stock(model), torch.ones(2, 6, dtype=torch.long)
    mask[0, :4] = 0
    options = {"attention_mask": mask, "max_new_tokens": 12, "do_sample": False}
    assert torch.equal(model.generate(ids(6), **options), plain.generate(ids(6), **options))
    seen = torch.tril(torch.ones(6, 6, dtype=torch.bool))
    seen[4, 1] = False
    added = torch.where(seen, 0.0, torch.finfo(torch.float32).min)
    for each in (
        added[None, None],
        added.expand(2, 2, 6, 6),
        *([] if implementation == "eager" else [seen[None, None]]),
    ):
        with torch.no_grad():
            assert distance(*(m(input_ids=ids(6), attention_mask=each).logits for m in (model, plain))) < 1e-5


def test_caches_that_are_repeated_selected_copied_or_saved_are_continued(folder: Path) -> None:
    def run(model: Any) -> Tensor:
        cache, found = DynamicCache(), []

        def step(cache: Any, index: int, rows: int = 1) -> None:
            found.append(model(input_ids=ids(9)[:rows, index : index + 1], past_key_values=cache).logits[:1])

        with torch.inference_mode():
            model(input_ids=ids(9)[:1], past_key_values=cache)
            step(cache, 0)
        with torch.no_grad():
            step(cache, 1)
            cache.batch_repeat_interleave(2)
            step(cache, 2, rows=2)
            cache.batch_select_indices(torch.tensor([1]))
            step(cache, 3)
            shallow = copy.copy(cache)
            shallow.layers = [copy.copy(layer) for layer in cache.layers]
            for index, each in enumerate((shallow, cache, shallow)):
                step(each, index)
            file = io.BytesIO()
            torch.save(shallow, file)
            file.seek(0)
            for each in (torch.load(file, weights_only=False), shallow, cache):
                step(each, 5)
        return torch.cat([each.clone() for each in found], dim=1)

    model = load(folder)
    assert distance(run(model), run(stock(model))) < 1e-5


def test_modules_that_are_replaced_are_let_go(folder: Path) -> None:
    def one_by_one(model: Any) -> None:
        for layer in model.model.layers:
            layer.mlp.up_proj = layer.mlp.up_proj.dequantize()

    for change in (lambda model: model.dequantize(), one_by_one):
        model = load(folder)
        before, old = logits(model), weakref.ref(model.model.layers[0].mlp.up_proj)
        change(model)
        assert distance(logits(model), before) < 1e-5
        gc.collect()
        assert old() is None
        assert not fused(model)


def test_layers_may_be_dropped_or_shared(folder: Path) -> None:
    model, other = load(folder), load(folder)
    other.model.layers = model.model.layers
    assert distance(decoded(other), decoded(model)) == 0.0
    model.model.layers = model.model.layers[:1]
    model.config.num_hidden_layers = 1
    assert distance(decoded(model), decoded(stock(model))) < 1e-5


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_a_forked_process_goes_on(folder: Path) -> None:
    model = load(folder)
    expected = decoded(model)
    if (child := os.fork()) == 0:
        os._exit(0 if distance(decoded(model), expected) < 1e-6 else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_signatures_are_those_of_the_layers_own_code(folder: Path) -> None:
    model = load(folder)
    assert inspect.signature(fused(model)[0].forward) == inspect.signature(stock(model).model.layers[0].forward)


def test_loading_leaves_no_trace(folder: Path) -> None:
    before = torch.random.get_rng_state()
    model = load(folder)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert not model.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_a_model_that_cannot_be_tried_loads_as_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(modeling_llama.LlamaModel, "forward", fail)
        assert not fused(load(folder))
    with monkeypatch.context() as patch:
        patch.setattr(match, "norm_of", fail)
        assert not fused(load(folder))


@pytest.mark.parametrize("name", ["parameter", "buffer"])
def test_a_layer_with_values_of_its_own_stays_as_it_is(folder: Path, name: str) -> None:
    """In the first layer they may be such that a comparison shows nothing."""
    model = stock(load(folder))
    getattr(model.model.layers[1], f"register_{name}")("scale", nn.Parameter(torch.ones(1)))
    assert fuse_layers(model) == 1


@pytest.mark.parametrize("where", ["meta", "disk"])
def test_offloaded_layers_stay_as_they_are(folder: Path, tmp_path: Path, where: str) -> None:
    parts = dict.fromkeys(("model.embed_tokens", "model.norm", "model.rotary_emb", "lm_head", "model.layers.1"), "cpu")
    places: Any = "meta" if where == "meta" else parts | {"model.layers.0": "disk"}
    model = load(folder, device_map=places, offload_folder=str(tmp_path))
    assert not fused(model)
    if where == "disk":
        assert distance(logits(model), logits(load(folder))) < 1e-5


def test_models_that_were_quantized_in_memory_run_in_few_calls() -> None:
    model, config = tiny(), QuantizeConfig(bits=4, group_size=32, quality="fast")
    quantize_model(model, config, [ids(64)])
    attach(model, config)
    assert isinstance(model.model.layers[0].mlp.up_proj, QuantLinear)
    assert len(fused(model)) == 2
    assert distance(decoded(model), decoded(stock(model))) < 1e-5


@pytest.mark.skipif(VERSION_4, reason="transformers 4 has other switches")
def test_another_attention_may_be_chosen_later(folder: Path) -> None:
    model = load(folder)
    plain = stock(model)
    for implementation in ("eager", "sdpa"):
        for each in (model, plain):
            each.set_attn_implementation(implementation)
        assert distance(decoded(model), decoded(plain)) < 1e-5
