"""What rows are tied together by: the same whoever has which batches, and only as far as two halves agree."""

from __future__ import annotations

import functools

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from gptq_backend import QuantizeConfig, RunOptions, quantize_model
from gptq_backend.distributed import Team
from gptq_backend.model.row_moments import RowMoments
from gptq_backend.model.token_weights import Sensitivity


def tied(seed: int, tokens: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    directions = torch.randn(3, 24, generator=torch.Generator().manual_seed(0))
    return torch.randn(2, tokens, 3, generator=generator) @ directions + 0.1 * torch.randn(
        2, tokens, 24, generator=generator
    )


def test_the_factor_is_that_of_all_batches() -> None:
    layer, moments = nn.Linear(8, 24), RowMoments(Team())
    batches = [tied(i) for i in range(5)]
    for number, each in enumerate(batches):
        moments.add(number, layer, each)
    factor = moments.factor(layer, layer.weight)
    assert factor is not None
    joined = torch.cat([each.flatten(0, 1) for each in batches]).double()
    moment = joined.T @ joined
    assert torch.equal(factor.order, moment.diagonal().argsort(descending=True))
    inverse = torch.linalg.inv(factor.upper.T @ factor.upper)[factor.order.argsort()][:, factor.order.argsort()]
    damped = inverse - moment
    torch.testing.assert_close(damped, damped[0, 0] * torch.eye(24, dtype=torch.float64), atol=1e-2, rtol=1e-3)
    assert moments.factor(layer, layer.weight) is None  # used up


def test_of_one_batch_there_is_nothing_to_confirm_it() -> None:
    layer, moments = nn.Linear(8, 24), RowMoments(Team())
    moments.add(0, layer, tied(0))
    assert moments.factor(layer, layer.weight) is None


@pytest.mark.parametrize("value", [0.0, torch.nan], ids=["padding", "not finite"])
def test_rows_that_tell_nothing_count_for_nothing(value: float) -> None:
    found = []
    for more in (0, 400):
        layer, moments = nn.Linear(8, 24), RowMoments(Team())
        for number in range(4):
            moments.add(number, layer, torch.cat([tied(number), torch.full((2, more, 24), value)], dim=1))
        found.append(moments.factor(layer, layer.weight))
    plain, longer = found
    assert plain is not None
    assert longer is not None
    assert torch.equal(plain.upper, longer.upper)


def test_signs_alone_tie_no_rows_together() -> None:
    """Of v_proj without grouped heads, whose outputs nothing mixes; attention is nearly alike in all sequences."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2
    )
    model, moments, sensitivity = LlamaForCausalLM(config).eval(), RowMoments(Team()), Sensitivity()
    model.requires_grad_(False)
    block = model.model.layers[0]
    layers = [each for each in block.modules() if isinstance(each, nn.Linear)]
    for number in range(8):
        tokens = torch.randint(0, 128, (4, 64))
        tell = functools.partial(moments.add, number)
        sensitivity.of(block, "block", layers, functools.partial(model, tokens), None, 4 * number, tell)
    assert moments.factor(block.self_attn.q_proj, block.self_attn.q_proj.weight) is not None
    assert moments.factor(block.self_attn.v_proj, block.self_attn.v_proj.weight) is None


def test_wide_layers_are_left_out() -> None:
    layer, moments = nn.Linear(1, 8193, device="meta"), RowMoments(Team())
    for number in range(2):
        moments.add(number, layer, torch.ones(1, 8193))
    assert moments.factor(layer, layer.weight) is None


def test_what_attention_passes_on_is_closer_with_row_feedback() -> None:
    """Only q and k are rounded to few bits, and the output of attention is judged on other text."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.08,
    )
    original = LlamaForCausalLM(config).eval()
    keys = original.model.layers[0].self_attn.k_proj.weight
    keys.data = torch.randn(len(keys), 2) @ torch.randn(2, keys.shape[1]) / 16  # q is read along a few directions
    tokens = torch.randint(0, 128, (48, 64))
    passed: list[Tensor] = []

    def judge(model: nn.Module) -> Tensor:
        layer = model.get_submodule("model.layers.0.self_attn.o_proj")
        handle = layer.register_forward_pre_hook(lambda _, args: passed.append(args[0]))
        with torch.no_grad():
            model(tokens[32:])
        handle.remove()
        return passed.pop()

    expected = judge(original)

    def error(row_feedback: bool) -> float:
        model = LlamaForCausalLM(config).eval()
        model.load_state_dict(original.state_dict())
        rules = {r"-:.*(v|gate|up|down)_proj": {}, r"+:.*o_proj": {"bits": 8}}
        settings = QuantizeConfig(bits=3, group_size=16, dynamic=rules, row_feedback=row_feedback)
        quantize_model(model, settings, tokens[:32], options=RunOptions(batch_size=4))
        return float((judge(model) - expected).square().sum())

    assert error(True) < 0.8 * error(False)
