"""The choice of calibration samples: deterministic, misses no rare domain, no worse than chance, ends in time."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gptq_backend import CalibrationError, ConfigError
from gptq_backend.model.calibration_choice import Selection, select, sketch
from tests.toy import VOCABULARY, WIDTH, samples, toy

DOMAINS, DIMENSIONS, TOKENS = 4, 8, 32


def pool(seed: int, counts: tuple[int, ...], shift: float = 3.0) -> tuple[Tensor, list[str]]:
    """Moments [N, 1, D, D] of samples from domains that stretch directions of their own, and the domains' names."""
    generator = torch.Generator().manual_seed(seed)
    moments, names = [], []
    for domain, count in enumerate(counts):
        stretch = torch.ones(DIMENSIONS)
        stretch[2 * domain : 2 * domain + 2] = shift
        for _ in range(count):
            x = torch.randn(TOKENS, DIMENSIONS, generator=generator) * stretch
            moments.append(x.T @ x / TOKENS)
            names.append(f"domain {domain}")
    return torch.stack(moments)[:, None], names


def equal(names: list[str]) -> dict[str, float]:
    return dict.fromkeys(names, 1.0)


def mismatch(moments: Tensor, chosen: list[int], names: list[str]) -> float:
    """Distance of the chosen samples' mean moments to the mean of the domains', where the latter is the identity."""
    domains = [moments[[i for i, name in enumerate(names) if name == wanted], 0].mean(0) for wanted in sorted({*names})]
    target = torch.stack(domains).mean(0)
    root = torch.linalg.inv(torch.linalg.cholesky(target))
    return float((root @ moments[chosen, 0].mean(0) @ root.T - torch.eye(DIMENSIONS)).norm())


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 10**6), st.integers(DOMAINS, 12))
def test_moments_match_the_pools_no_worse_than_a_random_draws(seed: int, count: int) -> None:
    moments, names = pool(seed, (10,) * DOMAINS)
    chosen = list(select(moments, names, equal(names), count).chosen)
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randperm(len(names), generator=generator)[:count].tolist() for _ in range(31)]
    random = torch.tensor([mismatch(moments, draw, names) for draw in draws]).median()
    assert mismatch(moments, chosen, names) <= float(random)


def test_a_rare_domain_is_represented() -> None:
    moments, names = pool(0, (60, 60, 60, 2))
    chosen = select(moments, names, equal(names), 8).chosen
    assert {names[i] for i in chosen} == {f"domain {i}" for i in range(DOMAINS)}


def test_weights_say_how_much_a_source_counts() -> None:
    moments, names = pool(1, (20, 20), shift=6.0)
    counts = []
    for weight in (0.1, 1.0, 10.0):
        chosen = select(moments, names, {"domain 0": 1.0, "domain 1": weight}, 10).chosen
        counts.append(sum(names[i] == "domain 1" for i in chosen))
    assert counts == sorted(counts)
    assert counts[0] < counts[1] < counts[2]


def test_the_choice_is_the_same_again_and_takes_no_sample_twice() -> None:
    moments, names = pool(2, (10, 10))
    first, again = (select(moments.clone(), names, equal(names), 15, held_out=[3, 13], least=15) for _ in range(2))
    assert first == again
    assert len({*first.chosen}) == 15


@pytest.mark.parametrize(("count", "expected", "reason"), [(1, 1, "samples"), (7, 7, "samples"), (500, 20, "pool")])
def test_never_more_than_asked_for_or_there(count: int, expected: int, reason: str) -> None:
    moments, names = pool(3, (10, 10))
    found = select(moments, names, equal(names), count)
    assert (len(found.chosen), len(found.curve), found.reason) == (expected, expected, reason)


def test_samples_held_out_are_not_chosen() -> None:
    moments, names = pool(4, (10, 10))
    found = select(moments, names, equal(names), 100, held_out=[0, 5, 13], least=100)
    assert not {0, 5, 13} & {*found.chosen}
    assert len(found.chosen) == 17


def test_a_redundant_pool_ends_the_choice_at_once_but_not_below_the_least() -> None:
    moments, names = pool(5, (1,))
    same, names = moments.repeat(40, 1, 1, 1), names * 40
    judges = range(0, 40, 4)
    found = select(same, names, equal(names), 30, held_out=judges, channels=4096)
    assert (len(found.chosen), found.reason) == (1, "gap")
    assert "0.0 % above" in found.why
    assert len(select(same, names, equal(names), 30, held_out=judges, channels=4096, least=5).chosen) == 5


def test_more_channels_need_more_samples() -> None:
    moments, names = pool(6, (60, 60))
    judges = range(0, 120, 4)
    few, many = (
        len(select(moments, names, equal(names), 80, held_out=judges, channels=channels).chosen)
        for channels in (DIMENSIONS, 64 * DIMENSIONS)
    )
    assert few < many


def test_text_that_differs_counts_once_and_the_noise_of_few_tokens_by_channel() -> None:
    moments, names = pool(9, (40,))
    other, _ = pool(10, (0, 20))
    moments, names = torch.cat([moments, other]), names + names[:20]
    judges = range(40, 60)  # of a source that goes on otherwise than it began
    same, wide = (
        select(moments, names, equal(names), 30, held_out=judges, channels=channels, tokens=TOKENS, least=30).curve[-1]
        for channels in (DIMENSIONS, 8 * DIMENSIONS)
    )
    assert same.held_out / same.training > 2
    noise = 2 * DIMENSIONS / (30 * TOKENS)
    assert (wide.held_out - same.held_out) / same.training == pytest.approx(7 * noise)


def test_the_reason_is_told_with_the_figures_of_the_curve() -> None:
    moments, names = pool(7, (200, 200))
    judges = range(0, 400, 4)
    told = {}
    for channels, count in itertools.product((DIMENSIONS, 4 * DIMENSIONS, 64 * DIMENSIONS), (4, 200)):
        found = select(moments, names, equal(names), count, held_out=judges, channels=channels, least=2)
        told[found.reason] = found
    assert {"doubling", "samples"} <= told.keys()
    for found in told.values():
        late = found.curve[len(found.curve) // 2 :]
        excess = sum(point.held_out / point.training - 1 for point in late) / len(late)
        assert f"{100 * excess:.1f} % above" in found.why


def test_directions_that_the_pool_does_not_excite_are_no_obstacle() -> None:
    moments, names = pool(8, (6, 6))
    moments[..., 5, :] = moments[..., :, 5] = 0
    found: Selection = select(moments, names, equal(names), 4, held_out=[0, 1, 6, 7], least=4)
    assert len({*found.chosen}) == 4
    assert all(point.held_out > 0 for point in found.curve)


@pytest.mark.parametrize(("names", "count", "held_out"), [([], 3, []), (["a", "a"], 3, [0, 1]), (["a", "a"], 0, [0])])
def test_nothing_to_choose_from_is_refused(names: list[str], count: int, held_out: list[int]) -> None:
    with pytest.raises(CalibrationError, match="to choose from"):
        select(torch.ones(len(names), 1, 2, 2), names, {"a": 1.0}, count, held_out=held_out)


def test_the_sketch_is_the_second_moment_of_unit_tokens() -> None:
    model, ids = toy(blocks=2), torch.stack(samples(5))
    seen: list[Tensor] = []
    handle = model.blocks[1].register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with torch.no_grad():
        model(ids)
    handle.remove()
    unit = (seen[0] / seen[0].norm(dim=-1, keepdim=True)).float()
    found = sketch(model, ids)
    assert found.shape == (5, 2, WIDTH, WIDTH)  # blocks 0 and 1
    torch.testing.assert_close(found[:, 1], unit.mT @ unit / ids.shape[1])


def test_the_sketch_is_of_each_sample_whatever_is_beside_it() -> None:
    model, ids = toy(), torch.stack(samples(300))
    torch.testing.assert_close(sketch(model, ids)[-2:], sketch(model, ids[-2:]))


def test_one_huge_token_does_not_hide_the_others() -> None:
    model = toy()
    plain = torch.stack(samples(2, length=16))
    with torch.no_grad():
        model.embed.weight[0] *= 1e6
    huge = plain.clone()
    huge[:, 0] = 0
    before, after = sketch(model, plain)[:, 0], sketch(model, huge)[:, 0]
    assert float((before - after).norm() / before.norm()) < 0.5


def test_the_sketch_leaves_the_model_as_it_was() -> None:
    model, ids = toy(dtype=torch.bfloat16), torch.stack(samples(3))
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    sketch(model, ids)
    assert model.training
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert not any(module._forward_pre_hooks for module in model.modules())
    assert torch.equal(torch.get_rng_state(), state)


def test_one_block_at_a_time_is_needed_and_none_of_the_second_half() -> None:
    model = toy(blocks=8)
    events: list[tuple[str, int]] = []
    index = {block: i for i, block in enumerate(model.blocks)}
    sketch(
        model,
        torch.stack(samples(200)),
        on_block=lambda block: events.append(("in", index[block])),
        on_done=lambda block: events.append(("out", index[block])),
    )
    assert events == [(word, i) for i in range(4) for word in ("in", "out")]


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_pool_of_few_distinct_tokens_can_be_chosen_from(tokens: int) -> None:
    """Its moments have a low rank, and what float32 has in the other directions is rounding."""
    generator = torch.Generator().manual_seed(0)
    words = torch.nn.functional.normalize(torch.randn(4, 16, generator=generator), dim=-1)
    rows = words[torch.randint(0, 4, (40, tokens), generator=generator)]
    moments = (rows.mT @ rows / tokens)[:, None]
    assert len(select(moments, ["a", "b"] * 20, {"a": 1.0, "b": 1.0}, 8, held_out=range(4)).chosen) <= 8


def test_tokens_that_the_model_does_not_know_and_models_without_blocks_are_refused() -> None:
    with pytest.raises(ConfigError, match="repeated blocks"):
        sketch(torch.nn.Linear(2, 2), torch.zeros(1, 4, dtype=torch.long))
    model = toy()
    model.get_input_embeddings = lambda: model.embed
    with pytest.raises(CalibrationError, match="vocabulary has 48"):
        sketch(model, torch.full((1, 4), VOCABULARY))


def test_a_weight_that_is_never_quantized_may_be_shared() -> None:
    model = toy(blocks=2)
    model.blocks[1].mlp.down.weight = model.blocks[0].mlp.down.weight
    assert sketch(model, torch.stack(samples(2))).shape[0] == 2


def test_a_model_that_wants_other_inputs_says_so_and_the_blocks_can_be_named() -> None:
    model = toy()
    ids = torch.stack(samples(2))
    assert sketch(model, ids, block_name="blocks").shape == sketch(model, ids).shape
    with pytest.raises(ConfigError, match="'nowhere' is not a module"):
        sketch(model, ids, block_name="nowhere")
    model.embed.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(ValueError("pixels are missing")))
    with pytest.raises(CalibrationError, match=r"Toy cannot be called with token ids alone \(pixels are missing\)"):
        sketch(model, ids)
