"""Decoder layers that run in few calls: as exact as their own code, admitted by comparison, and unnoticed otherwise."""

from __future__ import annotations

import copy
import logging
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from gptq_backend import QuantizeConfig
from gptq_backend.kernels import cpu_attention, cpu_block
from gptq_transformers import GPTQConfig
from gptq_transformers.fused import remove_fused
from gptq_transformers.fused.forward import FusedForward
from tests.kernels.checks import native
from tests.transformers.checkpoints import NAMES, VERSION_4, distance, ids, load, load_peer, logits, tiny, write

pytestmark = native
CONFIG = QuantizeConfig(bits=4, group_size=32, quality="fast")
FAMILIES = (
    "llama", "mistral", "qwen2", "qwen3", "gemma", "smollm3", "olmo2", "phi3", "glm", "glm4", "starcoder2", "helium",
)  # fmt: skip
# Not in transformers 4.57, or their layers return more there, or take other arguments.
NEW_FAMILIES = (
    "gemma2", "gemma3_text", "granite", "stablelm", "nemotron", "exaone4", "ernie4_5", "seed_oss", "arcee", "olmo3",
)  # fmt: skip
EXPERTS = {"moe_intermediate_size": 48, "num_experts_per_tok": 2}
GROUPS = {"n_routed_experts": 4, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1}
# What follows the attention is called as it is, or reads the same as the attention.
OTHER_MLPS: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"num_experts": 4, **EXPERTS},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 48, **EXPERTS},
    "olmoe": {"num_experts": 4, **EXPERTS},
    "mixtral": {},
    "glm4_moe": {**GROUPS, **EXPERTS},  # the first layer is no mixture
    "granitemoe": {"num_local_experts": 4, **EXPERTS},
    "minimax_m2": {"num_local_experts": 4, **EXPERTS},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2},  # sinks, and every other layer a sliding window
    "cohere": {},
    "cohere2": {},
    "phi": {},
}
OTHER_MLPS_IN_4 = ("qwen3_moe", "mixtral", "glm4_moe", "cohere", "cohere2")  # experts are modules of their own there


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small LLaMA."""
    folder = tmp_path_factory.mktemp("llama")
    write(folder, tiny(), CONFIG)
    return folder


def stock(model: nn.Module) -> nn.Module:
    """A copy whose layers run their own code."""
    plain = copy.deepcopy(model)
    remove_fused(plain)
    return plain


def fused(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if isinstance(vars(module).get("forward"), FusedForward)]


@torch.no_grad()
def decoded(model: Any, count: int = 6, **kwargs: Any) -> Tensor:
    """Logits of a prompt of two rows and of tokens after it, one by one: [2, T, vocabulary]."""
    cache, prompt = DynamicCache(), ids(9)
    found = [model(input_ids=prompt, past_key_values=cache, **kwargs).logits]
    found += [model(input_ids=ids(9 + count)[:, 9 + i, None], past_key_values=cache).logits for i in range(count)]
    return torch.cat(found, dim=1).float()


@pytest.mark.parametrize("family", [*FAMILIES, *([] if VERSION_4 else NEW_FAMILIES)])
def test_families_run_in_few_calls_and_give_what_their_own_code_gives(family: str, tmp_path: Path) -> None:
    write(tmp_path, tiny(family), CONFIG)
    model = load(tmp_path)
    assert len(fused(model)) == 2
    assert distance(decoded(model), decoded(stock(model))) < 1e-5


@pytest.mark.parametrize("family", OTHER_MLPS_IN_4 if VERSION_4 else OTHER_MLPS)
def test_mixtures_and_parallel_blocks_run_in_few_calls_and_give_what_their_own_code_gives(
    family: str, tmp_path: Path
) -> None:
    write(tmp_path, tiny(family, **OTHER_MLPS[family]), CONFIG)
    model = load(tmp_path)
    assert len(fused(model)) == 2
    assert distance(decoded(model), decoded(stock(model))) < 1e-5


@pytest.mark.parametrize("name", [name for name in NAMES if name.startswith(("llama", "qwen2"))])
def test_every_format_runs_in_few_calls(name: str) -> None:
    """Act-order, asymmetric, 3 bits, and mixed widths."""
    model = load_peer(name, dtype=torch.float32)
    assert fused(model)
    assert distance(decoded(model), decoded(stock(model))) < 1e-5


# With norms of transformers and of torch, with experts, and beside its MLP.
@pytest.mark.parametrize("family", ["llama", "starcoder2", *([] if VERSION_4 else ["qwen3_moe", "phi"])])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_layers_are_as_exact_as_their_own_code(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    write(tmp_path, tiny(family, **OTHER_MLPS.get(family, {})), CONFIG)
    exact = decoded(stock(load(tmp_path)).double())
    model = load(tmp_path, dtype=dtype)
    assert len(fused(model)) == 2
    assert distance(decoded(model), exact) < 1.5 * distance(decoded(stock(model)), exact)


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"num_beams": 3}, {"use_cache": False}])
def test_generate_gives_the_same_tokens(folder: Path, options: dict[str, Any]) -> None:
    model = load(folder)
    prompts, mask = ids(12), torch.ones(2, 12, dtype=torch.long)
    mask[0, :5] = 0  # padded
    arguments = {"attention_mask": mask, "max_new_tokens": 40, "do_sample": False, **options}
    assert torch.equal(model.generate(prompts, **arguments), stock(model).generate(prompts, **arguments))


@pytest.mark.skipif(not cpu_attention.serves_prompts(), reason="torch's attention may be the faster one here")
@pytest.mark.parametrize("left_out", [0, 3])
def test_a_prompt_goes_through_our_attention(folder: Path, left_out: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, rows, attend = load(folder), list[int](), cpu_attention.attend

    def spy(q: Tensor, *rest: Any) -> Tensor:
        rows.append(q.shape[1])
        return attend(q, *rest)

    monkeypatch.setattr(cpu_attention, "attend", spy)
    mask = torch.ones_like(ids())
    mask[0, :left_out] = 0
    given = {"input_ids": ids(), "attention_mask": mask}
    with torch.no_grad():
        found = model(**given).logits
        assert rows == [mask.shape[1]] * model.config.num_hidden_layers
        assert distance(found, stock(model)(**given).logits) < 1e-5
        rows.clear()
        found = model(**given, is_causal=False).logits
        assert not rows
        assert distance(found, stock(model)(**given, is_causal=False).logits) < 1e-5


def test_a_cache_that_was_cropped_or_reordered_is_continued(folder: Path) -> None:
    model = load(folder)
    results = []
    for each in (model, stock(model)):
        cache = DynamicCache()
        with torch.no_grad():
            for token in ids(10).T:
                each(input_ids=token[:, None], past_key_values=cache)
            before = cache.layers[0].keys
            kept = before.clone()
            branch = copy.deepcopy(cache)
            cache.crop(-3)
            cache.reorder_cache(torch.tensor([1, 0]))
            first = each(input_ids=ids(1), past_key_values=cache).logits
            second = each(input_ids=ids(1), past_key_values=branch).logits
        assert torch.equal(before, kept)  # who holds them still has what they had
        results.append(torch.cat([first, second]))
    assert distance(*results) < 1e-5


def test_what_hears_or_replaces_modules_is_heard(folder: Path) -> None:
    model = load(folder)
    layer, plain = fused(model)[0], decoded(stock(model))
    heard = []
    handle = layer.mlp.down_proj.register_forward_hook(lambda *_: heard.append(1))
    decoded(model)
    handle.remove()
    assert heard
    layer.self_attn.q_proj = nn.Sequential(layer.self_attn.q_proj)  # as an adapter does
    layer.self_attn.q_proj.register_forward_hook(lambda *_: heard.append(2))
    assert distance(decoded(model), plain) < 1e-5
    assert 2 in heard
    layer.self_attn.q_proj = layer.self_attn.q_proj[0]
    handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: heard.append(3))
    decoded(model)
    handle.remove()
    assert 3 in heard


def test_new_values_are_read(folder: Path) -> None:
    """Norms and quantized layers that change in place, are replaced, loaded or cast."""
    model = load(folder)
    before = decoded(model)
    layer = fused(model)[0]
    layer.input_layernorm.weight.data = layer.input_layernorm.weight.data * 2
    assert distance(decoded(model), before) > 1e-2
    assert distance(decoded(model), decoded(stock(model))) < 1e-5
    state = {key: value.clone() for key, value in load(folder).state_dict().items()}
    model.load_state_dict(state)
    assert distance(decoded(model), before) < 1e-6
    layer.self_attn.q_proj.unprepare()
    assert distance(decoded(model), before) < 1e-5
    layer.self_attn.q_proj.prepare()
    cast = decoded(model.to(torch.bfloat16))
    assert distance(cast, before) < 0.05


def test_gradients_and_training_run_the_layers_own_code(folder: Path) -> None:
    model = load(folder)
    model(input_ids=ids()).logits.sum().backward()
    layer = fused(model)[0]
    assert layer.input_layernorm.weight.grad is not None
    model.train()
    with torch.no_grad():
        assert not layer.forward.serves(torch.randn(1, 2, 64), {})


def test_attentions_that_are_asked_for_are_returned(folder: Path) -> None:
    model = load(folder, attn_implementation="eager")
    with torch.no_grad():
        output = model(input_ids=ids(), output_attentions=True, output_hidden_states=True)
    assert len(output.attentions) == 2
    assert len(output.hidden_states) == 3


def test_copies_and_pickles_run_in_few_calls_on_their_own_weights(folder: Path) -> None:
    model = load(folder)
    before = decoded(model)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert len(fused(other)) == 2
        assert fused(other)[0].forward.parts.layer is fused(other)[0]
        with torch.no_grad():
            fused(model)[0].input_layernorm.weight.mul_(2)
            assert distance(decoded(other), before) < 1e-6
            fused(model)[0].input_layernorm.weight.div_(2)


def test_the_state_dict_and_what_is_saved_are_the_same(folder: Path, tmp_path: Path) -> None:
    model = load(folder)
    assert model.state_dict().keys() == stock(model).state_dict().keys()
    model.save_pretrained(tmp_path)
    assert distance(logits(load(tmp_path)), logits(model)) == 0.0


def test_threads_share_a_model(folder: Path) -> None:
    model = load(folder)
    expected, wrong = decoded(model), []

    def run() -> None:
        wrong.extend(each for each in (distance(decoded(model), expected) for _ in range(3)) if each > 1e-6)

    threads = [threading.Thread(target=run) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_compiled_models_are_compiled_module_by_module(folder: Path) -> None:
    model = load(folder)
    expected = logits(model)
    with torch.no_grad():
        found = torch.compile(model, backend="eager")(input_ids=ids()).logits
    assert distance(found, expected) < 1e-5


def test_it_can_be_turned_off(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert not fused(load(folder, quantization_config=GPTQConfig(bits=4, fuse=False)))
    monkeypatch.setenv(cpu_block.FUSE_VARIABLE, "0")
    assert not fused(load(folder))


def test_a_layer_that_computes_something_else_stays_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """As one would whose code we take for another's."""
    from transformers.models.llama import modeling_llama

    original = modeling_llama.apply_rotary_pos_emb

    def other(q: Tensor, k: Tensor, *args: Any, **kwargs: Any) -> Any:
        return original(q, k + 0.01 * q[:, :1], *args, **kwargs)

    monkeypatch.setattr(modeling_llama, "apply_rotary_pos_emb", other)
    with caplog.at_level(logging.INFO, "gptq_transformers"):
        model = load(folder)
    assert not fused(model)
    assert "computes something else" in caplog.text


def test_layers_with_other_names_stay_as_they_are() -> None:
    assert not fused(load_peer("opt-4-32"))
