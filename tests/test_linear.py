"""The life of a QuantLinear: copies, casts, moves and reloads leave the stored tensors and the outputs alone."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor, nn

from gptq_backend import CheckpointError, ConfigError, PackedWeight, QuantLinear
from gptq_backend.format import encode
from gptq_backend.kernels import reference
from gptq_backend.kernels import table as kernels
from gptq_backend.kernels.triton import operators as triton
from tests.format.test_stored_tensors import random_weight


def layer(bits: int = 4, act_order: bool = True, bias: bool = True, **options: int) -> QuantLinear:
    sizes = {"columns": 64, "outputs": 32, "size": 16, **options}
    weight = random_weight(bits, **sizes, act_order=act_order)
    return QuantLinear.from_weight(
        weight, torch.randn(sizes["outputs"]) if bias else None, name="model.layers.0.q_proj"
    ).unprepare()


def bytes_of(state: dict[str, Tensor]) -> dict[str, bytes]:
    return {
        name: f"{tensor.dtype}{tuple(tensor.shape)}".encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes()
        for name, tensor in state.items()
    }


def saved_and_loaded(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


def half_and_back(model: nn.Module) -> nn.Module:
    return model.half().bfloat16().double().to(torch.float32)


LIVES: dict[str, Callable[[nn.Module], nn.Module]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": saved_and_loaded,
    "to(cpu)": lambda model: model.to("cpu"),
    "to(float16)": lambda model: model.to(torch.float16),
    "half": lambda model: model.half(),
    "bfloat16": lambda model: model.bfloat16(),
    "double": lambda model: model.double(),
    "half_and_back": half_and_back,
    "eval": lambda model: model.eval(),
    "requires_grad_": lambda model: model.requires_grad_(False),
}


@pytest.mark.parametrize("prepared", [True, False])
@pytest.mark.parametrize("life", LIVES)
def test_outputs_and_stored_bytes_survive(life: str, prepared: bool) -> None:
    model = nn.Sequential(layer(), nn.ReLU())
    x = torch.randn(3, 64)
    before, expected = bytes_of(model.state_dict()), copy.deepcopy(model)(x)
    if prepared:
        model[0].prepare()
    model = LIVES[life](model)
    assert bytes_of(model.state_dict()) == before
    assert torch.equal(model(x), expected)
    assert bytes_of(model.state_dict()) == before


def test_copies_do_not_share_memory() -> None:
    original = layer().prepare()
    twin = copy.deepcopy(original)
    twin.bias.data.add_(1)
    twin.unprepare().scales.data.mul_(2)
    assert torch.equal(layer_output(original), layer_output(original))
    assert not torch.equal(layer_output(original), layer_output(twin))


def layer_output(model: QuantLinear) -> Tensor:
    return model(torch.ones(1, 64))


def test_outputs_follow_the_dtype_of_x_not_of_the_layer() -> None:
    model = layer().half()
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        assert model(torch.randn(2, 64).to(dtype)).dtype == dtype


def test_state_dict_has_the_checkpoints_names_shapes_and_dtypes() -> None:
    model = layer().prepare().bfloat16()
    state = model.state_dict()
    assert {name: tuple(t.shape) for name, t in state.items()} == model.stored_spec.shapes
    assert {name: t.dtype for name, t in state.items()} == model.stored_spec.dtypes
    assert list(model.state_dict(prefix="a.b.")) == [f"a.b.{name}" for name in state]


def test_parameters_are_not_trainable_except_a_bias_set_so() -> None:
    model = layer().prepare()
    assert not any(parameter.requires_grad for parameter in model.parameters())
    model.bias.requires_grad_()
    model(torch.randn(2, 64)).sum().backward()
    assert model.bias.grad is not None


def test_loading_into_a_prepared_layer_replaces_its_weight() -> None:
    first, second = layer(), layer(bits=4, act_order=True)
    other = random_weight(4, 64, 32, 16, seed=9)
    second = QuantLinear.from_weight(other, torch.randn(32))
    first.prepare()(torch.randn(1, 64))
    first.load_state_dict(second.state_dict())
    x = torch.randn(3, 64)
    assert torch.equal(first(x), second(x))
    assert first.spec.act_order == second.spec.act_order


@pytest.mark.parametrize("key", ["qweight", "qzeros"])
def test_packed_words_that_were_cast_are_refused(key: str) -> None:
    model = layer()
    model.load_state_dict({**model.state_dict(), key: getattr(model, key).long()}, assign=True)
    with pytest.raises(CheckpointError, match=rf"q_proj\.{key}: .* torch\.int64, expected torch\.int32"):
        model(torch.randn(1, 64))


def test_missing_and_unexpected_tensors_are_reported() -> None:
    model = layer()
    state = model.state_dict()
    del state["qzeros"]
    state["perm"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match=r"(?s)qzeros.*perm"):
        layer().load_state_dict(state)


def test_prepare_and_unprepare_are_idempotent_and_exact() -> None:
    model = layer()
    before = bytes_of(model.state_dict())
    model.prepare().prepare()
    model.unprepare().unprepare()
    assert bytes_of({name: p.data for name, p in model.named_parameters()}) == before


def test_weights_that_were_never_loaded_are_an_error() -> None:
    spec, _ = encode(random_weight(4, 64, 32, 16))
    model = QuantLinear(spec, "model.layers.0.q_proj", device="meta")
    with pytest.raises(CheckpointError, match=r"model\.layers\.0\.q_proj: its weights were never loaded"):
        model.prepare()
    with pytest.raises(CheckpointError, match="never loaded"):
        model(torch.randn(1, 64))


@pytest.mark.parametrize(
    ("tensor", "value", "message"), [("scales", float("nan"), "NaN"), ("g_idx", 99, "expected 0..3")]
)
def test_damaged_values_name_the_module_at_first_use(tensor: str, value: float, message: str) -> None:
    model = layer()
    getattr(model, tensor).data.flatten()[0] = value
    with pytest.raises(CheckpointError, match=rf"model\.layers\.0\.q_proj\.{tensor}.*{message}"):
        model(torch.randn(1, 64))


def test_unknown_backend_names_the_choices() -> None:
    model = layer()
    model.backend = "warp9"
    with pytest.raises(ConfigError, match=r"warp9.*reference"):
        model.prepare()


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_dequantize_gives_an_ordinary_linear(dtype: torch.dtype, bias: bool) -> None:
    model = layer(bias=bias)
    dense = model.dequantize(dtype)
    assert type(dense) is nn.Linear
    assert dense.weight.dtype == dtype
    assert (dense.bias is not None) == bias
    assert torch.equal(dense.weight, model.quantized_weight().dequantize().to(dtype))
    x = torch.randn(3, 64)
    assert torch.allclose(model.dequantize()(x), model(x), atol=1e-4)


def test_meta_layer_moved_to_a_device_is_empty_not_wrong() -> None:
    spec, tensors = encode(random_weight(4, 64, 32, 16))
    model = QuantLinear(spec, device="meta").to_empty(device="cpu")
    model.load_state_dict(tensors)
    assert torch.equal(model(torch.eye(64)), model.quantized_weight().dequantize().t())


def test_layer_without_g_idx_in_the_file_has_none_in_its_state_dict() -> None:
    spec, tensors = encode(random_weight(4, 64, 32, 16))
    model = QuantLinear(dataclasses.replace(spec, has_g_idx=False))
    model.load_state_dict({name: t for name, t in tensors.items() if name != "g_idx"})
    model.prepare()
    assert set(model.state_dict()) == {"qweight", "qzeros", "scales"}


def test_memory_is_the_stored_bytes() -> None:
    model = layer(columns=512, outputs=256, size=64).prepare()
    held = sum(parameter.nbytes for parameter in model.parameters())
    assert held <= 1.1 * model.stored_spec.nbytes
    assert not list(model.buffers())


def test_threads_that_call_a_layer_for_the_first_time_do_not_repack_it_twice(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = layer(), torch.randn(3, 64)
    expected, together, repacked = copy.deepcopy(model)(x), threading.Barrier(4), []

    def prepare(weight: PackedWeight) -> dict[str, Tensor]:
        repacked.append(weight.spec)
        time.sleep(0.05)
        return row.prepare(weight)

    def call(_: int) -> Tensor:
        together.wait()
        return model(x)

    row = kernels.select_kernel(model.spec, x.device)
    monkeypatch.setattr(kernels, "KERNELS", [dataclasses.replace(row, prepare=prepare)])
    with ThreadPoolExecutor(4) as threads:
        assert all(torch.equal(y, expected) for y in threads.map(call, range(4)))
    assert len(repacked) == 1


@pytest.mark.parametrize("again", [QuantLinear.prepare, lambda model: model.unprepare().prepare()])
def test_a_layer_first_called_in_inference_mode_can_be_trained_through(
    again: Callable[[QuantLinear], QuantLinear],
) -> None:
    model, x = layer(), torch.randn(3, 64, requires_grad=True)
    with torch.inference_mode():
        again(model)(x)
    model(x).sum().backward()
    assert x.grad is not None


def test_inference_and_gradient_paths_agree() -> None:
    model = layer().prepare()
    x = torch.randn(3, 64)
    with torch.inference_mode():
        fast = model(x)
    tracked = model(x.requires_grad_())
    tracked.sum().backward()
    assert torch.equal(fast, tracked)
    assert torch.allclose(x.grad, model.dequantize().weight.sum(0).expand(3, -1), atol=1e-4)


def test_repr_tells_what_serves_it() -> None:
    model = layer()
    assert "not prepared" in repr(model)
    assert "kernel=reference" in repr(model.prepare()) or "kernel=" in repr(model)


def test_attributes_that_adapters_look_for() -> None:
    model = layer()
    assert (model.in_features, model.out_features) == (64, 32)
    assert model.qweight.dtype == torch.int32
    assert model.compute_dtype == torch.float16


def test_a_copy_of_a_prepared_layer_is_prepared() -> None:
    """Else whole-model compilation would break at it."""
    original = layer().prepare()
    for copied in (copy.deepcopy(original), pickle.loads(pickle.dumps(original))):
        x = torch.randn(3, copied.in_features)
        with torch.no_grad():
            compiled = torch.compile(copied, backend="eager", fullgraph=True)
            torch.testing.assert_close(compiled(x), original(x))


def test_input_of_a_wrong_width_or_type_is_named() -> None:
    original = layer().prepare()
    with pytest.raises(ValueError, match="expected floating point with a last dimension of"):
        original(torch.randn(2, original.in_features // 2))
    with pytest.raises(ValueError, match="int64"):
        original(torch.ones(2, original.in_features, dtype=torch.long))


@pytest.mark.parametrize("grad", [True, False])
def test_functional_call_takes_the_parameters_and_refuses_the_state_dict(grad: bool) -> None:
    model = layer().prepare()
    x = torch.randn(3, 64, requires_grad=grad)
    expected = model(x)
    assert torch.equal(torch.func.functional_call(model, dict(model.named_parameters()), x), expected)
    with pytest.raises(ValueError, match=r"qweight is \(8, 32\), .* named_parameters\(\)"):
        torch.func.functional_call(model, model.state_dict(), x)
    assert torch.equal(model(x), expected)


def test_an_expert_changes_rows_and_not_its_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a machine whose fastest row has no grouped product, as NVIDIA GPUs are."""
    fastest = dataclasses.replace(reference.KERNEL, name="fastest")
    grouped = dataclasses.replace(triton.KERNEL, supports=lambda spec, device: None)
    monkeypatch.setenv("GPTQ_BACKEND_SELF_CHECK", "0")  # Triton multiplies nothing here
    monkeypatch.setattr(kernels, "KERNELS", [fastest, grouped, reference.KERNEL])
    monkeypatch.setattr(kernels, "EXPERT_KERNELS", [dataclasses.replace(triton.EXPERTS, kernel=grouped)])
    layer = QuantLinear.from_weight(random_weight(4, 64, 32, 16))
    before = {key: tensor.clone() for key, tensor in layer.state_dict().items()}
    for expert, row in ((None, fastest), (True, grouped), (None, grouped), (False, fastest)):
        assert layer.prepare(expert).kernel is row
        assert all(torch.equal(tensor, before[key]) for key, tensor in layer.state_dict().items())
