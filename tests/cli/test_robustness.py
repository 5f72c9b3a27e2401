"""Gradient-chosen swaps: which tokens they touch, what they do to the loss, and what the figures mean."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")

from torch import Tensor, nn

from gptq_backend import GPTQError
from gptq_cli import robustness as module
from gptq_cli.models import load_model
from gptq_cli.robustness import all_embeddings, lines, losses, measure
from tests.cli.tiny_models import tiny_llama


def _model(seed: int) -> nn.Module:
    return tiny_llama(seed, spread=0.2, vocab_size=48)


def attack(model: nn.Module, window: Tensor, swaps: int, excluded: Sequence[int] = ()) -> Tensor:
    return module.attack(model, all_embeddings(model), window, swaps, excluded)


def test_swaps_touch_only_the_first_half_and_each_place_once() -> None:
    window = torch.randint(48, (16,), generator=torch.Generator().manual_seed(0))
    attacked = attack(_model(0), window, 5)
    changed = (attacked != window).nonzero().flatten().tolist()
    assert 0 < len(changed) <= 5
    assert all(1 <= place < 8 for place in changed)


def test_excluded_tokens_are_never_swapped_in() -> None:
    window = torch.zeros(16, dtype=torch.int64)
    plain, model = attack(_model(0), window, 5), _model(0)
    excluded = sorted(set(plain.tolist()) - {0})
    found = set(attack(model, window, 5, [*excluded, 10**6]).tolist()) - {0}
    assert found
    assert not found & set(excluded)


def test_as_many_candidates_are_tried_as_there_are() -> None:
    window = torch.zeros(16, dtype=torch.int64)
    found = attack(_model(0), window, 5, range(2, 48))
    assert set(found.tolist()) <= {0, 1}
    with pytest.raises(GPTQError, match="no token is left"):
        attack(_model(0), window, 5, range(48))


def test_one_swap_found_by_gradients_is_nearly_the_best_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, window = _model(0), torch.randint(48, (8,), generator=torch.Generator().manual_seed(1))
    every = window.repeat(3 * 48, 1)
    for row, (place, token) in zip(every, itertools.product((1, 2, 3), range(48))):
        row[place] = token
    all_losses = losses(model, every)
    found = losses(model, attack(model, window, 1)[None]).item()
    assert (all_losses > found).double().mean() < 0.05
    monkeypatch.setattr(module, "_CANDIDATES", 10**6)
    assert losses(model, attack(model, window, 1)[None]).item() == pytest.approx(all_losses.max().item(), rel=1e-5)


def test_the_gradient_is_that_of_the_loss() -> None:
    model, window = _model(0).double(), torch.randint(48, (8,), generator=torch.Generator().manual_seed(2))
    gains = module._gains(model, all_embeddings(model), window)
    table = model.get_input_embeddings().weight.detach()
    step = 1e-2  # the loss is in float32
    for place, token in ((1, 5), (3, 40)):
        x = table[window][None].clone()
        x[0, place] += step * (table[token] - table[window[place]])
        with torch.no_grad():
            moved = module._losses(model, window[None], inputs_embeds=x)
            rest = module._losses(model, window[None], input_ids=window[None])
        assert ((moved - rest) / step).item() == pytest.approx(gains[place, token].item(), rel=0.03, abs=1e-3)


def test_a_model_beside_itself_shows_no_difference() -> None:
    model = _model(0)
    result = measure(model, model, torch.randint(48, (3, 16)), 2)
    assert result.difference == 0
    assert result.rise == pytest.approx(result.transferred)
    assert result.rise > 0
    assert "2 tokens swapped" in "\n".join(lines(result))


def test_swaps_found_on_a_model_hurt_it_more_than_those_found_on_another() -> None:
    result = measure(_model(0), _model(1), torch.randint(48, (4, 16)), 3)
    assert result.rise > result.transferred
    assert result.reference_rise > result.transferred_back
    assert result.difference == pytest.approx(result.rise - result.reference_rise)
    assert all(value is not None for value in dataclasses.asdict(result).values())


@pytest.mark.parametrize("swaps", [0, 8, 100])
def test_more_swaps_than_a_window_has_room_for_are_refused(swaps: int) -> None:
    with pytest.raises(GPTQError, match="room for 1 to 7 swaps"):
        measure(_model(0), _model(0), torch.randint(48, (1, 16)), swaps)


def test_losses_of_few_windows_at_once_are_those_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    model, windows = _model(0), torch.randint(48, (5, 16), generator=torch.Generator().manual_seed(3))
    together = losses(model, windows)
    sizes: list[int] = []
    model.register_forward_pre_hook(lambda _, args, kwargs: sizes.append(len(kwargs["input_ids"])), with_kwargs=True)
    monkeypatch.setattr(module, "_TOKENS", 40)
    torch.testing.assert_close(losses(model, windows), together)
    assert sizes == [2, 2, 1]


def test_a_quantized_model_is_attacked_through_its_own_kernels(quantized: Path, original: Path) -> None:
    model, reference = load_model(quantized), load_model(original)
    ids = torch.randint(model.config.vocab_size, (2, 16), generator=torch.Generator().manual_seed(0))
    result = measure(model, reference, ids, 2)
    assert result.rise > 0
    assert result.reference_rise > 0
