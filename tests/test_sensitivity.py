"""Token weights: which layers get them, what they are, and what taking derivatives must not disturb."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptq_backend import QuantizeConfig, quantize_model
from gptq_backend.hessian import Hessian
from gptq_backend.sensitivity import Sensitivity
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
    found = Sensitivity().of(module, "block", layers, lambda: module(*args, **kwargs), mask)
    return {layers[layer]: weight for layer, weight in found.items()}


def test_weights_are_squared_derivatives_summed_over_the_readers_of_one_input() -> None:
    module, x = block(), hidden(1)
    attention = module.attn
    inputs = module.norm1(x).detach()
    outputs = [layer(inputs).detach() for layer in (attention.q, attention.k, attention.v)]
    signs = Sensitivity()._signs(LENGTH, x).clone()
    signs[0] = 0

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
    assert (found[:, 0] > 4 * found[:, 1:].amax(1)).all()


def test_a_longer_sequence_or_batch_leaves_the_signs_alone() -> None:
    sensitivity, like = Sensitivity(), hidden()
    short = sensitivity._signs(5, like).clone()
    assert torch.equal(sensitivity._signs(900, like)[:5], short)
    assert set(short.unique().tolist()) == {-1, 1}


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
    """Low-rank projections as in multi-head latent attention: the layer after the first has not mixed tokens yet."""

    class Latent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.down, self.up = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)
            self.q, self.o = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

        def forward(self, x: Tensor) -> Tensor:
            kv = self.up(F.silu(self.down(x)))
            return self.o(F.scaled_dot_product_attention(self.q(x), kv, kv, causal()))

    assert set(weights(Latent().double(), hidden())) == {"down", "up", "q"}


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
        quantize_model(model, QuantizeConfig(group_size=16), samples())
    assert "blocks.0: every token counts the same, no derivative could be taken" in caplog.text
    quantize_model(plain, QuantizeConfig(group_size=16, token_weights=False), samples())
    for key, value in plain.state_dict().items():
        assert torch.equal(model.state_dict()[key], value), key


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
