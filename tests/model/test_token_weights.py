"""Token weights: which layers get them, what they are, and what taking derivatives must not disturb."""

from __future__ import annotations

import gc
import logging
import weakref
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptq_backend import QuantizeConfig, RunOptions, quantize_model
from gptq_backend.algorithm.hessian import Hessian
from gptq_backend.distributed import Team
from gptq_backend.model.layer_inputs import Factors, LayerInput
from gptq_backend.model.placement import Placement
from gptq_backend.model.structure import Target
from gptq_backend.model.token_weights import Sensitivity
from tests.toy import WIDTH, Attention, Block, Mlp, SparseMlp, samples, toy

LENGTH = 9


def causal() -> Tensor:
    return torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril()


def block(mlp: nn.Module | None = None, parallel: bool = False) -> Block:
    torch.manual_seed(0)
    return Block(mlp or Mlp(), parallel).double()


def hidden(batch: int = 2) -> Tensor:
    return torch.randn(batch, LENGTH, WIDTH, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def weights(module: nn.Module, *args: Any, mask: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
    layers = {layer: name for name, layer in module.named_modules() if isinstance(layer, nn.Linear)}
    found = Sensitivity().of(module, "block", layers, lambda: module(*args, **kwargs), mask, 0)
    return {layers[layer]: weight for layer, weight in found.items()}


def test_weights_are_squared_derivatives_summed_over_the_readers_of_one_input() -> None:
    module, x = block(), hidden(1)
    attention = module.attn
    inputs = module.norm1(x).detach()
    outputs = [layer(inputs).detach() for layer in (attention.q, attention.k, attention.v)]
    signs = Sensitivity()._signs(0, LENGTH, x)
    signs[:, 0] = 0

    def mixed(*qkv: Tensor) -> Tensor:
        return (F.scaled_dot_product_attention(*qkv, causal()) * signs).sum()

    gradients = torch.autograd.functional.jacobian(mixed, tuple(outputs))
    expected = sum(gradient.square().sum(-1) for gradient in gradients)
    found = weights(module, x, causal())
    assert set(found) == {"attn.q", "attn.k", "attn.v"}
    for weight in found.values():
        torch.testing.assert_close(weight, expected)


def test_a_token_that_all_others_look_at_outweighs_them() -> None:
    module = block()
    mask = causal()
    mask[:, 1:] &= torch.eye(LENGTH, dtype=torch.bool)[:, 1:]  # each sees the first token and itself
    module.attn.q.weight.data.mul_(1e-3)  # both about equally
    found = weights(module, hidden(), mask)["attn.v"]
    assert (found[:, 0] > 2 * found[:, 1:].amax(1)).all()


def test_a_longer_sequence_or_batch_leaves_the_signs_alone() -> None:
    sensitivity, like = Sensitivity(), hidden()
    short = sensitivity._signs(3, 5, like)
    assert torch.equal(sensitivity._signs(3, 900, like)[:, :5], short)
    larger = sensitivity._signs(0, 5, hidden(9))
    assert torch.equal(larger[3:5], short)
    assert torch.equal(larger[7:], sensitivity._signs(7, 5, like))


def test_sequences_and_batches_have_signs_of_their_own() -> None:
    sensitivity, like = Sensitivity(), torch.empty(16, 64, 48)
    signs = torch.cat([sensitivity._signs(16 * number, 64, like) for number in range(8)])
    assert set(signs.unique().tolist()) == {-1, 1}
    for products in (signs[:, 5] * signs[:, 9], signs[:, :, 2] * signs[:, :, 7], signs[0] * signs[1:]):
        assert products.mean().abs() < 0.1


def test_parallel_mlp_reads_the_same_input_and_gets_no_weights() -> None:
    assert set(weights(block(parallel=True), hidden(), causal())) == {"attn.q", "attn.k", "attn.v"}


def test_where_nothing_mixes_tokens_nothing_is_weighed() -> None:
    class Alone(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mlp, self.experts = Mlp(), SparseMlp()

        def forward(self, x: Tensor) -> Tensor:
            return self.experts(x + self.mlp(x))

    assert weights(Alone().double(), hidden()) == {}


def test_layers_in_a_row_before_attention_are_all_weighed() -> None:
    """As in multi-head latent attention: after the first layer no tokens are mixed yet, and the latents are 4-D."""

    class Latent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
            self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            kv = self.up(F.silu(self.down(x)).unsqueeze(1)).squeeze(1)
            return self.o(F.scaled_dot_product_attention(self.q(x), kv, kv, causal()))

    found = weights(Latent().double(), hidden())
    assert {name: weight.shape for name, weight in found.items()} == dict.fromkeys(("down", "up", "q"), (2, LENGTH))


def test_padding_neither_weighs_nor_is_weighed_by() -> None:
    module, x = block(), hidden(1)
    padded = torch.cat([torch.randn(1, 3, WIDTH, dtype=x.dtype), x], dim=1)
    length = LENGTH + 3
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    mask[3:, :3] = False
    kept = torch.tensor([[0] * 3 + [1] * LENGTH])
    plain, found = weights(module, x, causal()), weights(module, padded, mask, mask=kept)
    for name in plain:
        assert not found[name][:, :3].any()
        torch.testing.assert_close(found[name][:, 3:], plain[name])


def test_a_model_that_writes_into_a_layers_output_keeps_working() -> None:
    class InPlace(Attention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q = self.q(x)
            q *= 0.5
            return self.o(F.scaled_dot_product_attention(q, self.k(x), self.v(x), mask))

    assert set(weights(InPlace().double(), hidden(), causal())) == {"q", "k", "v"}


def assert_same(model: nn.Module, other: nn.Module) -> None:
    for key, value in other.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


class _NoDerivative(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.cumsum(1)


class Opaque(Attention):
    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.o(_NoDerivative.apply(self.v(x)))


def test_an_operation_without_a_derivative_is_said_and_the_model_still_quantized(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, plain = toy(blocks=1), toy(blocks=1)
    for each in (model, plain):
        each.blocks[0].attn.__class__ = Opaque
    with caplog.at_level(logging.WARNING, "gptq_backend"):
        quantize_model(model, QuantizeConfig(group_size=16), samples(), options=RunOptions(batch_size=1))
    assert caplog.text.count("blocks.0: every token counts the same, no derivative could be taken") == 1
    quantize_model(
        plain, QuantizeConfig(group_size=16, token_weights=False), samples(), options=RunOptions(batch_size=1)
    )
    assert_same(model, plain)


def test_an_error_of_the_model_itself_is_the_callers() -> None:
    class Broken(Attention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            raise KeyError("mask")

    module = Broken().double()
    with pytest.raises(KeyError):
        weights(module, hidden(), causal())
    assert all(parameter.requires_grad for parameter in module.parameters())


def test_nothing_is_left_behind() -> None:
    module = block()
    module.norm1.weight.requires_grad_(False)
    before = [parameter.requires_grad for parameter in module.parameters()]
    with torch.no_grad():
        weights(module, hidden(), causal())
        assert not torch.is_grad_enabled()
    assert [parameter.requires_grad for parameter in module.parameters()] == before
    assert all(parameter.grad is None for parameter in module.parameters())
    assert not any(layer._forward_hooks or layer._forward_pre_hooks for layer in module.modules())


def test_the_graph_is_freed_at_once() -> None:
    seen: list[weakref.ref[Tensor]] = []

    class Watched(Attention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q = self.q(x)
            seen.append(weakref.ref(q))
            return self.o(F.scaled_dot_product_attention(q, self.k(x), self.v(x), mask))

    gc.disable()
    try:
        assert weights(Watched().double(), hidden(), causal())
        assert seen[0]() is None
    finally:
        gc.enable()


def test_a_callers_inference_mode_does_not_take_the_weights_away() -> None:
    model, plain, config = toy(blocks=1), toy(blocks=1), QuantizeConfig(group_size=16)
    with torch.inference_mode():
        quantize_model(model, config, samples())
    quantize_model(plain, config, samples())
    assert_same(model, plain)


def test_a_model_loaded_in_inference_mode_is_quantized_without_weights_and_that_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    with torch.inference_mode():
        model = toy(blocks=1)
    plain = toy(blocks=1)
    with caplog.at_level(logging.WARNING, "gptq_backend"):
        quantize_model(model, QuantizeConfig(group_size=16), samples())
    assert "no derivative could be taken: the model was loaded in inference mode" in caplog.text
    quantize_model(plain, QuantizeConfig(group_size=16, token_weights=False), samples())
    assert_same(model, plain)


def test_a_layer_that_is_called_twice_is_weighed_for_its_first_call() -> None:
    class Twice(Attention):
        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            q, k, v = self.q(x), self.k(x), self.v(x)
            return self.o(F.scaled_dot_product_attention(q, k, v, mask) + self.v(x[:, :1]))

    found = weights(Twice().double(), hidden(), causal())
    assert {name: weight.shape for name, weight in found.items()} == dict.fromkeys("qkv", (2, LENGTH))


def test_a_block_that_mixes_nothing_is_run_for_one_batch_only() -> None:
    mlp, sensitivity = Mlp().double(), Sensitivity()
    runs: list[Tensor] = []

    def run() -> None:
        runs.append(mlp(hidden()))

    for name in ("blocks.0", "blocks.0", "blocks.1"):
        assert sensitivity.of(mlp, name, [mlp.gate, mlp.up, mlp.down], run, None, 0) == {}
    assert len(runs) == 2


def test_a_batch_of_single_tokens_does_not_take_the_others_their_weights() -> None:
    module, sensitivity, x = block(), Sensitivity(), hidden()
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    alone = torch.zeros(2, LENGTH, dtype=torch.long)
    alone[:, 3] = 1
    for mask, weighed in ((alone, 0), (None, 3), (alone, 0), (None, 3)):
        assert len(sensitivity.of(module, "block", layers, lambda: module(x, causal()), mask, 0)) == weighed


def test_blocks_without_a_layer_to_quantize_are_not_run_for_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    original = Sensitivity.of

    def of(self: Sensitivity, block: nn.Module, name: str, *args: Any) -> dict[nn.Module, Tensor]:
        asked.append(name)
        return original(self, block, name, *args)

    monkeypatch.setattr(Sensitivity, "of", of)
    quantize_model(toy(blocks=3), QuantizeConfig(group_size=16, keep_edge_blocks=1), samples())
    assert set(asked) == {"blocks.1"}


def hessian(*inputs: LayerInput) -> Tensor:
    layer = nn.Linear(WIDTH, WIDTH)
    shared = Factors(Placement(), Team()).of(Target("layer", layer, QuantizeConfig(group_size=16)), list(inputs))
    assert shared is not None
    return shared.hessian.matrix("layer")


def test_a_batch_without_weights_counts_as_an_average_one_and_leaves_the_others_theirs() -> None:
    x, alone = hidden(), hidden()[:1, :1]
    weight = torch.rand(x.shape[:2], dtype=torch.float64)
    found = hessian(LayerInput(0, x, None, weight), LayerInput(1, alone, None, None))
    rows = x.flatten(0, 1)
    expected = rows.t() @ (rows * (weight / weight.mean()).view(-1, 1)) + alone[0].t() @ alone[0]
    torch.testing.assert_close(found, expected)


def test_a_mask_that_does_not_fit_the_hidden_states_leaves_the_weights() -> None:
    """Some models put tokens of their own in front."""
    x, weight = hidden(), torch.rand(2, LENGTH, dtype=torch.float64)
    mask = torch.ones(2, LENGTH - 2, dtype=torch.long)
    assert torch.equal(hessian(LayerInput(0, x, mask, weight)), hessian(LayerInput(0, x, None, weight)))


def test_padding_of_4d_latents_is_left_out() -> None:
    x, weight = hidden(), torch.rand(2, LENGTH, dtype=torch.float64)
    mask = torch.ones(2, LENGTH, dtype=torch.long)
    mask[0, :3] = 0
    flat, found = hessian(LayerInput(0, x, mask, weight)), hessian(LayerInput(0, x.unsqueeze(1), mask, weight))
    torch.testing.assert_close(found, flat)


def test_a_weighted_hessian_is_the_weighted_sum() -> None:
    x, weight = torch.randn(2, 5, 3, dtype=torch.float64), torch.rand(2, 5, dtype=torch.float64)
    hessian = Hessian(3, torch.float64)
    hessian.add(x, weight)
    rows = x.flatten(0, 1)
    torch.testing.assert_close(hessian.matrix("layer"), rows.t() @ (rows * weight.view(-1, 1)))


def test_large_weights_of_float16_rows_do_not_overflow() -> None:
    hessian = Hessian(2)
    hessian.add(torch.full((1, 2), 3e4, dtype=torch.float16), torch.tensor([100.0]))
    assert (hessian.tokens, hessian.dropped) == (1, 0)


def mixed(model: nn.Module, data: list[Tensor]) -> Tensor:
    """What the first block's attention passes on."""
    seen: list[Tensor] = []
    hook = model.blocks[0].attn.o.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(torch.stack(data))
    hook.remove()
    return seen[0]


def test_what_attention_passes_on_is_more_accurate_than_with_tokens_counted_alike() -> None:
    """All tokens look at the first one, which is one of many, small, and in channels that the others hardly use."""
    errors = {}
    for weigh in (False, True):
        model, original = toy(blocks=1), toy(blocks=1)
        for each in (model, original):
            each.blocks[0].norm1 = nn.Identity()
            each.embed.weight.data[:, :4] *= 0.05
            each.embed.weight.data[0] = 0
            each.embed.weight.data[0, :4] = 0.5
            each.blocks[0].attn.k.weight.data[:, :4] += 20.0
            each.blocks[0].attn.q.bias.data.fill_(1.0)
        data = samples(8)
        for ids in data:
            ids[ids == 0] = 1
            ids[0] = 0
        quantize_model(model, QuantizeConfig(bits=3, group_size=16, token_weights=weigh), data)
        errors[weigh] = float((mixed(model, data) - mixed(original, data)).square().mean())
    assert errors[True] < 0.5 * errors[False]


def test_the_derivatives_that_weights_are_made_of_are_told() -> None:
    module, x = block(), hidden(2)
    told: dict[nn.Module, Tensor] = {}
    layers = [layer for layer in module.modules() if isinstance(layer, nn.Linear)]
    found = Sensitivity().of(module, "block", layers, lambda: module(x, causal()), None, 0, told.__setitem__)
    assert set(told) == set(found)
    readers = sum(each.square().sum(-1) for each in told.values())
    for weight in found.values():
        torch.testing.assert_close(weight, readers)
