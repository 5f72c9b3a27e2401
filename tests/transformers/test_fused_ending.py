"""The head runs in the layers' call, and nobody can tell from the results; nor from what is done to its modules."""

from __future__ import annotations

import copy
import dataclasses
import gc
import io
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import prune
from torch.testing._internal.two_tensor import TwoTensor
from transformers import DynamicCache

from gptq_backend import quantize_model
from gptq_backend.kernels import cpu_dense, cpu_layers
from gptq_transformers import GPTQConfig
from gptq_transformers.fused import fuse_layers
from gptq_transformers.fused.ending_forward import HeadForward, NormForward
from gptq_transformers.hf_quantizer import attach
from tests.kernels.checks import native
from tests.transformers.checkpoints import distance, ids, load, tiny, write
from tests.transformers.test_fused import CONFIG, decoded, stock
from tests.transformers.test_fused_ahead import begun, step

pytestmark = native
LAYERS = 3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    write(folder, tiny(num_hidden_layers=LAYERS), CONFIG)
    return folder


@pytest.fixture
def endings(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Of each call of several layers, whether it had an ending."""
    counted: list[bool] = []
    run = cpu_layers.run_layers

    def noting(*args: Any) -> Any:
        counted.append(args[-1] is not None)
        return run(*args)

    monkeypatch.setattr(cpu_layers, "run_layers", noting)
    return counted


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Of each product of a head that ran by itself, how many rows it had."""
    counted: list[int] = []
    call = cpu_dense.Product.__call__

    def noting(self: Any, x: Tensor) -> Tensor:
        counted.append(x[..., 0].numel())
        return call(self, x)

    monkeypatch.setattr(cpu_dense.Product, "__call__", noting)
    return counted


def assert_alike(model: Any, endings: list[bool], expected: list[bool], count: int = 3) -> None:
    """That steps give what the modules give, and which of them had an ending."""
    plain = stock(model)
    cache, other = begun(model), begun(plain)
    endings.clear()
    for _ in range(count):
        assert distance(step(model, cache), step(plain, other)) < 1e-5
    assert endings == expected


@pytest.mark.parametrize("bits", [None, 8])
def test_a_step_with_the_head_takes_one_call(
    folder: Path, bits: int | None, endings: list[bool], products: list[int]
) -> None:
    model = load(folder, quantization_config=GPTQConfig(bits=4, quantize_head=bits))
    found = decoded(model, 12)
    assert endings == [True] * 11
    assert products == ([] if bits else [2])  # of the first step; a prompt has too many rows
    assert distance(found, decoded(stock(model), 12)) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bits_too(folder: Path, dtype: torch.dtype, endings: list[bool]) -> None:
    model = load(folder, dtype=dtype)
    found = decoded(model)
    assert endings[-1]
    assert distance(found, decoded(stock(model))) < (2e-2 if dtype is torch.bfloat16 else 2e-3)


def test_a_tied_quantized_embedding_is_multiplied_in_the_call(endings: list[bool]) -> None:
    model, config = tiny(tie_word_embeddings=True), dataclasses.replace(CONFIG, embed_bits=8)
    quantize_model(model, config, [ids(64)])
    attach(model, config)
    found = decoded(model)
    assert endings[-1]
    assert distance(found, decoded(stock(model))) < 1e-5


def test_logits_of_all_positions_and_of_the_last_are_those_of_the_modules(folder: Path, endings: list[bool]) -> None:
    model = load(folder)
    cache, plain, other = begun(model), stock(model), begun(model)
    for tokens, kwargs in ((ids(4), {}), (ids(4), {"logits_to_keep": 1}), (ids(1), {"logits_to_keep": 1})):
        with torch.no_grad():
            found = model(input_ids=tokens, past_key_values=cache, **kwargs).logits
            assert distance(found, plain(input_ids=tokens, past_key_values=other, **kwargs).logits) < 1e-5
    assert endings[-3:] == [False, False, True]


@pytest.mark.parametrize("kind", ["norm", "norm in place", "norm before", "head", "head before", "layer"])
def test_hooks_are_heard(folder: Path, kind: str, endings: list[bool]) -> None:
    model = load(folder)
    module = {"norm": model.model.norm, "head": model.lm_head}.get(kind.split()[0], model.model.layers[-1])
    if kind.endswith("before"):
        module.register_forward_pre_hook(lambda _, args: (args[0] * 1.5,))
    elif kind.endswith("in place"):
        module.register_forward_hook(lambda *args: args[-1].mul_(1.5))
    else:
        module.register_forward_hook(lambda *args: args[-1] * 1.5)
    plain = stock(model)
    cache, other = begun(model), begun(plain)
    for _ in range(4):
        assert distance(step(model, cache), step(plain, other)) < 1e-5
    assert endings[-1] == (kind == "head")  # whose result only is another; others see the norm's or the layer's


@pytest.mark.parametrize(
    "change",
    [
        lambda model: setattr(model.model.norm, "weight", nn.Parameter(model.model.norm.weight.detach() * 2)),
        lambda model: setattr(model.lm_head, "weight", nn.Parameter(model.lm_head.weight.detach() * 2)),
        lambda model: setattr(model.lm_head, "bias", nn.Parameter(torch.ones(model.lm_head.out_features))),
        lambda model: setattr(model.lm_head.weight, "data", model.lm_head.weight.data * 2),
        lambda model: model.lm_head.weight.data.mul_(2),
        lambda model: setattr(model.model.norm, "variance_epsilon", 1.0),
    ],
    ids=["weight of the norm", "weight of the head", "bias", "data", "in place", "epsilon"],
)
def test_what_is_assigned_to_the_modules_is_read(folder: Path, change: Any) -> None:
    model = load(folder)
    cache = begun(model)
    before = step(model, copy.deepcopy(cache))
    change(model)
    plain, other = stock(model), copy.deepcopy(cache)
    for _ in range(2):
        found = step(model, cache)
        assert distance(found, step(plain, other)) < 1e-5
        assert distance(found, before) > 1e-3


def test_another_head_or_another_forward_is_called(folder: Path, endings: list[bool]) -> None:
    model = load(folder)
    begun(model)
    model.lm_head = nn.Linear(model.lm_head.in_features, 7, bias=False)
    assert_alike(model, endings, [False] * 3)
    model = load(folder)
    begun(model)
    model.lm_head.forward = lambda x: 3 * nn.functional.linear(x, model.lm_head.weight)
    wanted = step(stock(load(folder)), DynamicCache())
    assert distance(step(model, DynamicCache()), 3 * wanted) < 1e-5


def test_a_head_that_is_not_known_is_named_in_the_log(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = stock(load(folder))
    model.lm_head = nn.Sequential(model.lm_head)
    with caplog.at_level(logging.INFO, "gptq_transformers"):
        assert fuse_layers(model) == LAYERS
    assert "norm and head do not run in the call of the layers: Sequential is no head that it knows" in caplog.text
    assert "module by module" not in caplog.text


def test_a_model_without_its_head_runs_as_before(folder: Path, endings: list[bool]) -> None:
    model = load(folder)
    cache, other, plain = begun(model), begun(model), stock(model)
    for _ in range(3):
        with torch.no_grad():
            found = model.model(input_ids=ids(1), past_key_values=cache).last_hidden_state
            wanted = plain.model(input_ids=ids(1), past_key_values=other).last_hidden_state
        assert distance(found, wanted) < 1e-5
    assert endings[-3:] == [True, False, False]  # once in vain
    for _ in range(3):
        step(model, cache)
    assert endings[-1]


@pytest.mark.parametrize("name", ["lm_head", "model.norm"])
def test_weights_that_a_hook_makes_anew_are_read(folder: Path, name: str) -> None:
    model = load(folder)
    cache, pruned = begun(model), model.get_submodule(name)
    prune.random_unstructured(pruned, "weight", 0.5)
    for _ in range(2):
        step(model, cache)
    with torch.no_grad():
        pruned.weight_orig.mul_(torch.rand_like(pruned.weight_orig))
    wanted = step(stock(model), copy.deepcopy(cache))
    assert distance(step(model, cache), wanted) < 1e-5


def test_weights_of_another_kind_of_tensor_are_left_to_torch(folder: Path, endings: list[bool]) -> None:
    model = load(folder)
    cache, weight = begun(model), model.lm_head.weight.detach()
    wanted = step(stock(model), copy.deepcopy(cache))
    endings.clear()
    model.lm_head.weight = nn.Parameter(TwoTensor(weight, weight.clone()))
    assert distance(step(model, cache).a, wanted) < 1e-5
    assert endings == [False]


def addresses(module: nn.Module) -> set[int]:
    return {tensor.data_ptr() for tensor in module.parameters()}


def still_held(addresses: set[int]) -> int:
    """How many tensors are alive that lie there."""

    def lies_there(tensor: Tensor) -> bool:
        try:
            return tensor.numel() > 0 and tensor.data_ptr() in addresses
        except RuntimeError:  # one without memory, of another test
            return False

    gc.collect()
    return sum(map(lies_there, (each for each in gc.get_objects() if type(each) in (Tensor, nn.Parameter))))


def test_modules_that_have_gone_are_not_kept(folder: Path) -> None:
    model = load(folder)
    begun(model)
    head = addresses(model.lm_head)
    model.lm_head = nn.Linear(model.lm_head.in_features, 7, bias=False)
    assert not still_held(head)
    dropped = addresses(model.model.layers[-1])
    model.model.layers = model.model.layers[:-1]
    step(model, DynamicCache())
    assert not still_held(dropped)


def test_layers_that_get_another_dtype_do_not_keep_what_they_had(folder: Path) -> None:
    model = load(folder)
    begun(model)
    before = addresses(model) - addresses(model.model.embed_tokens)
    assert still_held(before)
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.double() if tensor.is_floating_point() else tensor.clone()
    step(model, DynamicCache())
    assert not still_held(before)


def test_what_the_norm_gave_keeps_no_weights(folder: Path) -> None:
    for steps in range(2):
        model = load(folder)
        cache = begun(model) if steps else DynamicCache()
        with torch.no_grad():
            kept = model.model(input_ids=ids(1), past_key_values=cache).last_hidden_state
        held = addresses(model)
        del model
        assert not still_held(held)
        assert kept.isfinite().all()


def test_many_sequences_leave_a_dense_head_to_torch(folder: Path, endings: list[bool], products: list[int]) -> None:
    model, cache = load(folder), DynamicCache()
    with torch.no_grad():
        for _ in range(4):
            model(input_ids=ids(1)[:1].expand(cpu_dense.FEW_ROWS + 1, 1), past_key_values=cache)
    assert endings == [False, False]
    assert not products


def test_gradients_and_autocast_pass_through_the_modules(folder: Path, products: list[int]) -> None:
    model = load(folder)
    begun(model)
    products.clear()
    logits = model(input_ids=ids(1)).logits
    logits.sum().backward()
    assert model.lm_head.weight.grad is not None
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert model(input_ids=ids(1)).logits.dtype is torch.bfloat16
    assert not products


def test_copies_and_pickles_run_by_themselves(folder: Path, endings: list[bool]) -> None:
    model = load(folder)
    begun(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        with torch.no_grad():
            other.lm_head.weight.mul_(2)
        assert_alike(other, endings, [True] * 3)
        assert distance(step(other, DynamicCache()), 2 * step(model, DynamicCache())) < 1e-5


def test_the_state_is_that_of_the_modules(folder: Path) -> None:
    model = load(folder)
    begun(model)
    assert isinstance(model.model.norm.forward, NormForward)
    assert isinstance(model.lm_head.forward, HeadForward)
    assert list(model.state_dict()) == list(stock(model).state_dict())


def test_results_that_are_kept_are_not_written_to_again(folder: Path) -> None:
    model = load(folder)
    cache = begun(model)
    found = [step(model, cache) for _ in range(3)]
    copies = [each.clone() for each in found]
    for _ in range(3):
        step(model, cache)
    assert all(torch.equal(*pair) for pair in zip(found, copies))
    assert not torch.equal(found[0], found[1])
