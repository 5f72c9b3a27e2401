"""Mixtures whose router runs in the fused calls: found by trying, the same choice, and unnoticed otherwise."""

from __future__ import annotations

import copy
import logging
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("transformers.models.qwen3_moe")
from transformers import DynamicCache

from gptq_backend.kernels.cpu_dense import Dense
from gptq_backend.kernels.cpu_router import Router, RouterParts, Rule
from gptq_transformers.fused import admit
from gptq_transformers.fused.match import tensor_at
from gptq_transformers.fused.mixture import find_pieces, find_rule
from tests.kernels.checks import native
from tests.transformers.checkpoints import VERSION_4, distance, ids, load, logits, tiny, write
from tests.transformers.test_fused import CONFIG, EXPERTS, OTHER_MLPS, decoded, fused, stock

pytestmark = [
    native,
    pytest.mark.skipif(VERSION_4, reason="experts are modules of their own, which the model's code calls one by one"),
]
GROUPED = {"n_routed_experts": 8, "n_group": 4, "topk_group": 2, **EXPERTS}
SHARED = {"moe_num_experts": 4, "moe_k": 2, "moe_num_shared_experts": 1, "moe_intermediate_size": 48}
RULES: dict[str, tuple[dict[str, Any], Rule]] = {
    "qwen3_moe": (OTHER_MLPS["qwen3_moe"], Rule(2)),
    "qwen3_moe, normalized": (OTHER_MLPS["qwen3_moe"] | {"norm_topk_prob": True}, Rule(2, normalized=True)),
    "qwen2_moe": (OTHER_MLPS["qwen2_moe"], Rule(2)),
    "mixtral": ({}, Rule(2, normalized=True)),
    "granitemoe": (OTHER_MLPS["granitemoe"], Rule(2, normalized=True)),
    "minimax_m2": (OTHER_MLPS["minimax_m2"], Rule(2, sigmoid=True, normalized=True)),
    "ernie4_5_moe": (SHARED | {"moe_layer_start_index": 0}, Rule(2, normalized=True)),
    "solar_open": (
        GROUPED | {"routed_scaling_factor": 2.5},
        Rule(2, sigmoid=True, groups=4, chosen_groups=2, best=2, normalized=True, scale=2.5),
    ),
}
FLOAT32 = "solar_open", "ernie4_5_moe"  # whose logits are not rounded


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small mixture with a gated expert for all tokens."""
    folder = tmp_path_factory.mktemp("qwen2_moe")
    write(folder, tiny("qwen2_moe", **OTHER_MLPS["qwen2_moe"]), CONFIG)
    return folder


def made(name: str, tmp_path: Path, **kwargs: Any) -> Any:
    family = name.partition(",")[0]
    model = tiny(family, **RULES[name][0])
    generator = torch.Generator().manual_seed(3)
    for key, buffer in model.named_buffers():
        if "correction_bias" in key:
            buffer.copy_(torch.rand(buffer.shape, generator=generator) / 4)
    write(tmp_path, model, CONFIG)
    return load(tmp_path, **kwargs)


@pytest.mark.parametrize("name", RULES)
def test_routers_are_found_by_trying_and_a_step_takes_one_call(name: str, tmp_path: Path, runs: list[int]) -> None:
    model = made(name, tmp_path)
    found = decoded(model, 8)
    mixture = fused(model)[1].forward.parts.mixture
    assert mixture.rule == Rule(**vars(RULES[name][1]) | {"rounded": True})
    assert (mixture.correction is not None) == (name in ("minimax_m2", *FLOAT32))
    assert runs == [2] * 7
    assert distance(found, decoded(stock(model), 8)) < 1e-5
    prompt = ids(5)
    arguments = {"max_new_tokens": 24, "do_sample": False, "attention_mask": torch.ones_like(prompt)}
    assert torch.equal(model.generate(prompt, **arguments), stock(model).generate(prompt, **arguments))


@pytest.mark.parametrize("name", RULES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_in_16_bits_the_same_experts_are_chosen(name: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Where two are equally good too, of which there are many; but not where the last bit of a float32 sum decides."""
    model = made(name, tmp_path, dtype=dtype)
    mixture = fused(model)[1].forward.parts.mixture
    assert mixture.rule.rounded == (name not in FLOAT32)
    given: list[tuple[Tensor, Tensor]] = []
    experts = mixture.experts
    experts.register_forward_pre_hook(lambda module, args: given.append(args[1:]))
    x = torch.randn(1, 300, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    with torch.no_grad():
        mixture.block(x)
    router = RouterParts(
        Dense(tensor_at(mixture.weight), tensor_at(mixture.bias)), mixture.rule, tensor_at(mixture.correction)
    )
    index, counts = Router(router)(x[0])
    count = experts.num_experts
    wanted, found = (torch.zeros(300, count).scatter_(-1, i.long(), c.float()) for i, c in (given[0], (index, counts)))
    alike = ((wanted > 0) == (found > 0)).all(-1)
    assert alike.sum() >= 297
    assert distance(found[alike], wanted[alike]) < 5e-3


def test_16_bit_mixtures_are_as_exact_as_their_own_code(folder: Path) -> None:
    exact = decoded(stock(load(folder)).double())
    for dtype in (torch.bfloat16, torch.float16):
        model = load(folder, dtype=dtype)
        assert fused(model)[0].forward.parts.mixture is not None
        assert distance(decoded(model), exact) < 1.5 * distance(decoded(stock(model)), exact)


def expert_of(model: Any, layer: int = 1) -> Any:
    """One that every token chooses, as all are equally good."""
    block = model.model.layers[layer].mlp
    with torch.no_grad():
        block.gate.weight.zero_()
    chosen = int(torch.ones(1, 4).topk(2).indices[0, 0])
    return block.experts.get_submodule(f"{chosen}")


def listening(module: nn.Module, heard: list[int]) -> None:
    module.register_forward_hook(lambda *_: heard.append(1))


HEARD: dict[str, Callable[[Any], nn.Module]] = {
    "the block": lambda model: model.model.layers[1].mlp,
    "the router": lambda model: model.model.layers[1].mlp.gate,
    "the experts": lambda model: model.model.layers[1].mlp.experts,
    "their activation": lambda model: model.model.layers[1].mlp.experts.act_fn,
    "the shared expert": lambda model: model.model.layers[1].mlp.shared_expert,
    "a layer of it": lambda model: model.model.layers[1].mlp.shared_expert.down_proj,
    "its gate": lambda model: model.model.layers[1].mlp.shared_expert_gate,
    "a chosen expert's layer": lambda model: expert_of(model).down_proj,
}


@pytest.mark.parametrize("what", HEARD)
def test_hooks_inside_a_mixture_are_heard_while_they_are_there(what: str, folder: Path, runs: list[int]) -> None:
    """Of experts, those of the chosen ones, as without us."""
    model, heard = load(folder), []
    module = HEARD[what](model)
    decoded(model)
    assert runs
    listening(module, heard)
    found = decoded(model)
    assert heard
    module._forward_hooks.clear()
    count = len(heard)
    assert distance(found, decoded(model)) < 1e-5
    assert len(heard) == count


def test_a_hook_that_comes_between_two_layers_of_a_step_is_heard(folder: Path) -> None:
    """The second layer was computed already; what was is not used."""
    model, heard = load(folder), []
    layer = expert_of(model).down_proj
    cache = DynamicCache()
    with torch.no_grad():
        for _ in range(4):
            model(input_ids=ids(1), past_key_values=cache)
        model.model.layers[0].register_forward_hook(lambda *_: heard or listening(layer, heard))
        model(input_ids=ids(1), past_key_values=cache)
    assert heard


def scaled(tensor: Tensor) -> Tensor:
    return (tensor * 2).detach()


def replace_weight(model: Any) -> None:
    gate = model.model.layers[1].mlp.gate
    gate.weight = nn.Parameter(gate.weight.detach().roll(1, 0))


def swap_weight(model: Any) -> None:
    gate = model.model.layers[1].mlp.gate
    gate.weight.data = gate.weight.data.roll(1, 0)


def change_weight(model: Any) -> None:
    with torch.no_grad():
        model.model.layers[1].mlp.gate.weight.copy_(model.model.layers[1].mlp.gate.weight.roll(1, 0))


def change_setting(model: Any) -> None:
    model.model.layers[1].mlp.gate.norm_topk_prob = True


def change_top_k(model: Any) -> None:
    model.model.layers[1].mlp.gate.top_k = 1


def change_shared_gate(model: Any) -> None:
    linear = model.model.layers[1].mlp.shared_expert_gate
    linear.weight.data = linear.weight.data + 1


def patch_router(model: Any) -> None:
    gate = model.model.layers[1].mlp.gate
    own = type(gate).forward
    gate.forward = lambda x: (lambda logits, counts, index: (logits, counts * 2, index))(*own(gate, x))


def swap_scales(model: Any) -> None:
    layer = expert_of(model).down_proj
    layer.scales.data = layer.scales.data * 2


def replace_scales(model: Any) -> None:
    layer = expert_of(model).down_proj
    layer._parameters["scales"] = nn.Parameter(scaled(layer.scales), requires_grad=False)


def wrap_expert(model: Any) -> None:
    expert = expert_of(model)
    expert.down_proj = nn.Sequential(expert.down_proj, nn.ReLU())


CHANGES = (
    replace_weight, swap_weight, change_weight, change_setting, change_top_k, change_shared_gate, patch_router,
    swap_scales, replace_scales, wrap_expert,
)  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_what_changes_inside_a_mixture_is_read(change: Callable[[Any], None], folder: Path) -> None:
    model = load(folder)
    if change in (swap_scales, replace_scales, wrap_expert):
        expert_of(model)
    before = decoded(model)
    change(model)
    found = decoded(model)
    assert distance(found, before) > 1e-4
    plain = load(folder)
    for layer in fused(plain):
        del layer.forward
    change(plain)
    for each in plain.model.layers:
        each.mlp.experts._routed = each.mlp.experts._by_expert
    assert distance(found, decoded(plain)) < 1e-5


def test_scales_of_an_expert_can_be_swapped_for_a_call(folder: Path) -> None:
    model = load(folder)
    layer = expert_of(model).down_proj
    name = next(name for name, module in model.named_modules() if module is layer) + ".scales"
    swapped = {name: scaled(model.get_parameter(name))}
    before = logits(model)
    with torch.no_grad():
        for each in (model, stock(model)):
            found = torch.func.functional_call(each, swapped, kwargs={"input_ids": ids()}).logits
            assert distance(found, before) > 1e-4
    assert distance(logits(model), before) < 1e-6


def test_copies_and_pickles_have_their_own_router(folder: Path, runs: list[int]) -> None:
    model = load(folder)
    before = decoded(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        mixture = fused(other)[1].forward.parts.mixture
        assert mixture.block is other.model.layers[1].mlp
        decoded(other)  # finds its experts anew
        change_weight(model)
        runs.clear()
        assert distance(decoded(other), before) < 1e-6
        assert runs
        model = load(folder)


def test_a_model_that_is_cast_calls_its_mixtures_as_they_are(folder: Path, runs: list[int]) -> None:
    """The rule was found in another dtype, in which logits may be rounded or not."""
    model = load(folder)
    model.to(torch.bfloat16)
    expected = decoded(stock(model))
    assert not runs
    assert distance(decoded(model), expected) < 2e-2


def test_a_mixture_that_was_replaced_is_not_kept(folder: Path) -> None:
    model = load(folder)
    decoded(model)
    layer = model.model.layers[1]
    layer.mlp.experts = copy.deepcopy(layer.mlp.experts)
    expected = decoded(stock(model))
    assert distance(decoded(model), expected) < 1e-5
    assert layer.forward.parts.mixture is None


def test_a_router_of_another_kind_is_called_as_it_is_and_that_is_said_once(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from transformers.models.qwen2_moe import modeling_qwen2_moe

    original = modeling_qwen2_moe.Qwen2MoeTopKRouter.forward

    def forward(self: Any, x: Tensor) -> Any:
        scores, counts, index = original(self, x)
        return scores, counts.square(), index

    monkeypatch.setattr(modeling_qwen2_moe.Qwen2MoeTopKRouter, "forward", forward)
    with caplog.at_level(logging.INFO, "gptq_transformers"):
        model = load(folder)
    assert len(fused(model)) == 2
    assert fused(model)[0].forward.parts.mixture is None
    assert sum("a rule that is not known" in record.message for record in caplog.records) == 1
    assert distance(decoded(model), decoded(stock(model))) < 1e-5


def test_the_comparison_sees_a_call_that_gives_something_else(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one with a wrong rule would."""
    monkeypatch.setattr(admit, "find_rule", lambda pieces, dtype: altered(find_rule(pieces, dtype)))
    with caplog.at_level(logging.INFO, "gptq_transformers"):
        model = load(folder)
    assert fused(model)[0].forward.parts.mixture is None
    assert "it computes something else than the fused calls" in caplog.text


def altered(found: Any) -> Any:
    return type(found)(Rule(**vars(found.rule) | {"scale": 1.1}), found.bias, found.correction)


def test_the_trial_leaves_the_model_as_it_is(folder: Path) -> None:
    model = load(folder)
    block = model.model.layers[0].mlp
    state = {key: value.clone() for key, value in block.state_dict().items()}
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    find_rule(find_pieces(block), torch.float32)
    assert torch.equal(torch.rand(3), expected)
    assert "forward" not in vars(block.gate)
    for key, value in block.state_dict().items():
        assert torch.equal(value, state[key])
