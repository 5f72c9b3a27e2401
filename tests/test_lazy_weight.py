"""``QuantLinear.weight``: metadata are free, values are those of ``dequantize()``, the layer stays as it is."""

from __future__ import annotations

import copy
import io
import logging
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from gptq_backend import KERNELS, ConfigError, QuantLinear
from gptq_backend.format import encode
from gptq_backend.lazy_weight import LazyWeight
from tests.format.test_stored_tensors import random_weight

BACKENDS = [kernel.name for kernel in KERNELS if kernel.name in ("reference", "cpu", "cpu_w4a8")]


def layer(bits: int = 4, dtype: torch.dtype | None = None, backend: str | None = None, **options: Any) -> QuantLinear:
    weight = random_weight(bits, 64, 32, 16, **{"act_order": True, **options})
    return QuantLinear.from_weight(weight, torch.randn(32), name="model.q_proj", backend=backend, dtype=dtype)


@pytest.fixture
def unmade(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: LazyWeight) -> Tensor:
        raise AssertionError("values were made")

    monkeypatch.setattr(LazyWeight, "materialize", fail)


QUESTIONS: dict[str, Callable[[Tensor], Any]] = {
    "dtype": lambda w: w.dtype,
    "device": lambda w: w.device,
    "device.type": lambda w: w.device.type,
    "shape": lambda w: w.shape,
    "size()": lambda w: w.size(),
    "size(0)": lambda w: w.size(0),
    "ndim": lambda w: w.ndim,
    "dim()": lambda w: w.dim(),
    "numel()": lambda w: w.numel(),
    "len": len,
    "stride()": lambda w: w.stride(),
    "is_contiguous()": lambda w: w.is_contiguous(),
    "itemsize": lambda w: w.itemsize,
    "nbytes": lambda w: w.nbytes,
    "is_meta": lambda w: w.is_meta,
    "is_cuda": lambda w: w.is_cuda,
    "is_floating_point()": lambda w: w.is_floating_point(),
    "requires_grad": lambda w: w.requires_grad,
    "grad": lambda w: w.grad,
    "isinstance": lambda w: (isinstance(w, Tensor), isinstance(w, nn.Parameter), torch.is_tensor(w)),
    "detach().dtype": lambda w: w.detach().dtype,
    "data.shape": lambda w: w.data.shape,
    "x.to(dtype)": lambda w: torch.ones(2).to(w.dtype).dtype,
    "x.to(device)": lambda w: torch.ones(2).to(w.device).device,
}


@pytest.mark.usefixtures("unmade")
@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("question", QUESTIONS)
def test_metadata_of_the_weight_are_those_of_a_dense_one_and_make_no_values(question: str, prepared: bool) -> None:
    quantized = layer(dtype=torch.bfloat16)
    if not prepared:
        quantized.unprepare()
    dense = torch.empty(32, 64, dtype=torch.bfloat16)
    assert QUESTIONS[question](quantized.weight) == QUESTIONS[question](dense)


@pytest.mark.usefixtures("unmade")
def test_metadata_of_an_empty_layer_on_meta_are_known() -> None:
    spec, _ = encode(random_weight(4, 64, 32, 16))
    empty = QuantLinear(spec, device="meta", dtype=torch.float32)
    assert (empty.weight.dtype, empty.weight.device.type, empty.weight.shape) == (torch.float32, "meta", (32, 64))


@settings(max_examples=60, deadline=None)
@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    act_order=st.booleans(),
    sym=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.bfloat16, torch.float32, torch.float64]),
    prepared=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_values_are_the_dequantized_weight_rounded_once(
    bits: int, act_order: bool, sym: bool, dtype: torch.dtype, prepared: bool, backend: str
) -> None:
    quantized = layer(bits, dtype, backend, act_order=act_order, sym=sym)
    if not prepared:
        quantized.unprepare()
    hub = quantized.quantized_weight()
    index = hub.g_idx.long()
    wide = torch.promote_types(dtype, torch.float32)
    expected = ((hub.codes.to(wide) - hub.zeros.to(wide)[index]) * hub.scales.to(wide)[index]).t().to(dtype)
    assert torch.equal(quantized.weight + 0, expected)
    assert torch.equal(quantized.weight.materialize(), expected)
    assert quantized.weight.materialize().is_contiguous()


USES: dict[str, Callable[[Tensor], Tensor]] = {
    "to": lambda w: w.to(torch.float32),
    "float": lambda w: w.float(),
    "T": lambda w: w.T,
    "index": lambda w: w[3],
    "slice": lambda w: w[:5, 1:],
    "view": lambda w: w.view(4, 8, 64),
    "split": lambda w: torch.cat(w.split(8)),
    "clone": lambda w: w.clone(),
    "data": lambda w: w.data * 2,
    "stack": lambda w: torch.stack([w, w]),
    "einsum": lambda w: torch.einsum("nk,mk->nm", w.float(), w.float()),
    "numpy": lambda w: torch.from_numpy(w.numpy()),
    "tolist": lambda w: torch.tensor(w.tolist()),
    "iterate": lambda w: torch.stack([*w]),
    "norm": lambda w: w.float().norm(),
    "deepcopy": copy.deepcopy,
    "pickle": lambda w: pickle.loads(pickle.dumps(w)),
    "cat with dense": lambda w: torch.cat([torch.zeros(2, 64, dtype=w.dtype), w]),
}


@pytest.mark.parametrize("use", USES)
def test_operations_on_the_weight_give_ordinary_tensors(use: str) -> None:
    quantized = layer()
    found, expected = USES[use](quantized.weight), USES[use](quantized.dequantize(torch.float16).weight.detach())
    assert type(found) is Tensor
    assert torch.equal(found, expected)


@pytest.mark.parametrize("shape", [(64,), (3, 64), (2, 3, 64)])
def test_a_product_with_the_weight_sends_gradients_to_the_input(shape: tuple[int, ...]) -> None:
    quantized = layer(dtype=torch.float32)
    dense = quantized.dequantize()
    x = torch.randn(shape, requires_grad=True)
    again = x.detach().clone().requires_grad_()
    y = nn.functional.linear(x, quantized.weight, quantized.bias)
    assert torch.equal(y, dense(again))
    y.square().sum().backward()
    dense(again).square().sum().backward()
    torch.testing.assert_close(x.grad, again.grad)


def test_values_are_made_once_for_each_time_the_weight_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    quantized, made = layer(), []
    original = QuantLinear._dense_weight
    monkeypatch.setattr(QuantLinear, "_dense_weight", lambda self, dtype: made.append(1) or original(self, dtype))
    weight = quantized.weight
    for _ in range(3):
        weight + 1
        weight.detach() + 1
    assert len(made) == 1


def test_asking_for_the_weight_changes_no_parameter_no_state_and_no_memory() -> None:
    quantized = layer()
    before = {name: parameter.data_ptr() for name, parameter in quantized.named_parameters()}
    keys, attributes = list(quantized.state_dict()), set(vars(quantized))
    quantized.weight + 1
    assert {name: parameter.data_ptr() for name, parameter in quantized.named_parameters()} == before
    assert list(quantized.state_dict()) == keys
    assert set(vars(quantized)) == attributes
    assert not list(quantized.buffers())
    assert "weight" not in dict(copy.deepcopy(quantized).named_parameters())


WRITES: dict[str, Callable[[QuantLinear], Any]] = {
    "zero_": lambda q: q.weight.zero_(),
    "data.normal_": lambda q: q.weight.data.normal_(),
    "copy_": lambda q: q.weight.copy_(torch.zeros(32, 64)),
    "init": lambda q: nn.init.xavier_uniform_(q.weight),
    "setitem": lambda q: q.weight.__setitem__(slice(3), 0),
    "data": lambda q: setattr(q.weight, "data", torch.zeros(32, 64)),
    "add_": lambda q: q.weight.data.add_(1),
    "out": lambda q: torch.add(torch.ones(32, 64).half(), 1, out=q.weight),
    "in a list": lambda q: torch._foreach_mul_([q.weight], 2.0),
    "assign": lambda q: setattr(q, "weight", torch.zeros(32, 64)),
    "assign a parameter": lambda q: setattr(q, "weight", nn.Parameter(torch.zeros(32, 64))),
}


@pytest.mark.parametrize("write", WRITES)
def test_writing_to_the_weight_is_refused_with_what_to_do(write: str) -> None:
    quantized = layer()
    before = quantized.weight.clone()
    with pytest.raises(ConfigError, match=r"model\.q_proj\.weight is quantized and cannot .* dequantize\(\)"):
        WRITES[write](quantized)
    assert torch.equal(quantized.weight, before)


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize(
    ("change", "factor"),
    [
        (lambda w: w.div_(2**3), 1 / 8),
        (lambda w: w.mul_(4), 4),
        (lambda w: w.data.mul_(0.5), 0.5),
        (lambda w: w.div_(torch.tensor(2.0)), 0.5),
        (lambda w: w.div_(2**0), 1),
    ],
)
def test_scaling_the_weight_by_a_power_of_two_scales_the_layer(
    change: Callable[[Tensor], Any], factor: float, prepared: bool
) -> None:
    quantized = layer(dtype=torch.float32)
    if not prepared:
        quantized.unprepare()
    before, x = quantized.weight.clone(), torch.randn(2, 64)
    expected = nn.functional.linear(x, before * factor, quantized.bias)
    with torch.no_grad():
        change(quantized.weight)
    assert (quantized.kernel is not None) == prepared
    assert torch.equal(quantized.weight, before * factor)
    torch.testing.assert_close(quantized(x), expected, atol=1e-4, rtol=1e-4)


def test_scaling_that_the_scales_cannot_hold_is_refused() -> None:
    quantized = layer()
    before = quantized.weight.clone()
    for number in (3.3, 1e9):
        with pytest.raises(ConfigError, match=r"model\.q_proj\.weight cannot be multiplied by .* torch\.float16"):
            quantized.weight.mul_(number)
    assert torch.equal(quantized.weight, before)


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_its_dtype_follows_casts_of_the_model_as_that_of_a_dense_layer(cast: torch.dtype) -> None:
    model = nn.Sequential(layer(dtype=torch.float32), nn.Linear(32, 8))
    model.to(cast)
    assert model[0].weight.dtype == model[1].weight.dtype == cast
    for copied in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert copied[0].weight.dtype == cast
    assert layer().weight.dtype == torch.float16  # of the scales, where nobody says otherwise


class Reader(nn.Module):
    """Code that multiplies by the weight itself."""

    def __init__(self, values: bool) -> None:
        super().__init__()
        self.proj, self.values = layer(dtype=torch.float32), values

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.proj.weight.dtype).view(-1, self.proj.weight.shape[1])
        return x @ self.proj.weight.t() if self.values else self.proj(x)


@pytest.mark.parametrize("values", [True, False])
def test_a_forward_pass_that_needs_values_is_warned_about_once_per_model(
    values: bool, caplog: pytest.LogCaptureFixture
) -> None:
    one, two = Reader(values), Reader(values)
    with caplog.at_level(logging.WARNING, "gptq_backend"):
        for model in (one, one, two):
            model(torch.randn(2, 64))
        one.proj.weight.sum()  # in no forward pass
    found = [record.getMessage() for record in caplog.records if "reads the weight" in record.getMessage()]
    assert len(found) == (2 if values else 0)
    assert all("Reader" in message and "model.q_proj" in message for message in found)


@pytest.mark.parametrize("values", [True, False])
@pytest.mark.parametrize("grad", [True, False])
def test_a_compiled_model_that_reads_the_weight_is_one_graph(values: bool, grad: bool) -> None:
    model = Reader(values)
    x = torch.randn(2, 64, requires_grad=grad)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), model(x))
    if grad:
        compiled(x).sum().backward()
        torch.testing.assert_close(x.grad, model.proj.dequantize().weight.sum(0).expand(2, -1), atol=1e-4, rtol=1e-4)


def test_reading_only_the_dtype_leaves_no_dense_weight_in_the_graph() -> None:
    found = []

    def look(graph: torch.fx.GraphModule, _: Any) -> torch.fx.GraphModule:
        graph.graph.eliminate_dead_code()
        found.extend(str(node.target) for node in graph.graph.nodes)
        return graph

    torch.compile(Reader(False), backend=look, fullgraph=True)(torch.randn(2, 64))
    assert not any("dequantize" in target for target in found)
    assert any("gemm" in target for target in found)


def test_compiling_reaches_an_unprepared_layer_that_is_only_read() -> None:
    quantized = layer(dtype=torch.float32)
    expected = quantized.weight.sum()
    quantized.unprepare()
    assert torch.allclose(torch.compile(lambda: quantized.weight.sum(), backend="eager")(), expected)


def test_a_saved_weight_is_an_ordinary_tensor() -> None:
    quantized, buffer = layer(), io.BytesIO()
    torch.save({"weight": quantized.weight}, buffer)
    buffer.seek(0)
    assert torch.equal(torch.load(buffer)["weight"], quantized.weight.clone())
