"""``embed_bits``: which embeddings are quantized in a run, what the report says, and what is refused."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from gptq_backend import ConfigError, QuantEmbedding, QuantizeConfig, RunOptions, TiedHead, quantize_model
from gptq_backend.pipeline import find_embedding
from tests.toy import Toy, samples


class Owner(Toy):
    """A toy whose embeddings are told as transformers' models tell them."""

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head


def owner() -> Owner:
    torch.manual_seed(0)
    return Owner(tied=True)


def config(bits: int | None = 8, **more: Any) -> QuantizeConfig:
    return QuantizeConfig(**{"bits": 4, "group_size": 16, "quality": "fast", "embed_bits": bits, **more})


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("calibrated", [True, False])
def test_a_tied_weight_is_rounded_once_and_serves_both(bits: int, calibrated: bool) -> None:
    model = owner()
    original, ids = copy.deepcopy(model), torch.stack(samples(2))
    assert original.lm_head.weight is original.embed.weight
    report = quantize_model(model, config(bits), samples(16) if calibrated else None)
    assert type(model.embed) is QuantEmbedding
    assert type(model.lm_head) is TiedHead
    assert "embed" not in " ".join(report.kept)
    weight = model.embed.dequantize().weight
    error = (weight - original.embed.weight).norm() / weight.norm()
    assert error < (0.01 if bits == 8 else 0.2)
    rows = model.embed(ids)
    assert torch.equal(rows, weight[ids])
    x = torch.randn(3, weight.shape[1])
    assert torch.allclose(model.lm_head(x), x @ weight.t(), atol=1e-4)
    (rule,) = (each for key, each in (report.config.dynamic or {}).items() if "embed" in key)
    assert rule["bits"] == bits


def test_groups_of_its_own_may_be_whole_rows() -> None:
    model = owner()
    report = quantize_model(model, config(8, embed_group_size=-1), None)
    assert model.embed.spec.groups == 1
    assert model.embed.spec.in_features == 32
    (rule,) = (each for key, each in (report.config.dynamic or {}).items() if "embed" in key)
    assert rule["group_size"] == -1


def test_groups_of_an_embedding_that_stays_dense_are_refused() -> None:
    with pytest.raises(ConfigError, match="embed_group_size=-1, but the embedding stays in 16 bits; set embed_bits"):
        find_embedding(owner(), config(None, embed_group_size=-1))


def test_planes_that_cannot_hold_the_rows_are_refused_before_the_run() -> None:
    refused = r"embed is \[48, 32\], but checkpoint_format='gptq_p' packs 5-bit .*; use embed_bits=8 or 4, or leave"
    with pytest.raises(ConfigError, match=refused):
        quantize_model(owner(), config(5), None)


def test_one_scale_for_a_token_needs_a_head_that_is_tied() -> None:
    with pytest.raises(ConfigError, match="embed_group_size=-1 is one scale for a token, but Owner has no head .*tied"):
        find_embedding(Owner(), config(8, embed_group_size=-1))
    found = find_embedding(Owner(), config(8, embed_group_size=16))
    assert found is not None
    assert found.round().scales.shape == (3, 32)  # of 48 tokens


def test_a_run_with_training_leaves_it_frozen() -> None:
    model = owner()
    original = copy.deepcopy(model)
    settings = config(8, distill_epochs=1)
    options = RunOptions(batch_size=2)
    quantize_model(model, settings, samples(16), teacher=lambda: copy.deepcopy(original), options=options)
    before = copy.deepcopy(original)
    quantize_model(before, config(8), None)
    scales = [each.embed.state_dict()["scales"] for each in (model, before)]
    assert torch.equal(*scales)


def test_the_report_names_it_and_takes_it_for_no_idle_expert() -> None:
    model = owner()
    report = quantize_model(model, config(8), samples(16))
    (entry,) = (each for each in report.layers if each.name == "embed")
    assert (entry.bits, entry.method) == (8, "nearest")
    assert 0 < entry.relative_loss < 1e-3
    assert report.unrouted == []


def test_a_weight_that_others_use_too_is_refused() -> None:
    model = owner()
    model.other = nn.Embedding(1, 1)
    model.other.weight = model.embed.weight
    with pytest.raises(ConfigError, match=r"uses the weight of embed in lm_head, other too"):
        find_embedding(model, config())


def test_an_embedding_that_does_more_is_refused() -> None:
    class Shifted(nn.Embedding):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + 1

    model = owner()
    model.embed = Shifted(48, 32)
    with pytest.raises(ConfigError, match="is a Shifted, which does more than to look up rows"):
        find_embedding(model, config())


def test_a_model_without_one_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has no embedding of tokens"):
        find_embedding(nn.Linear(2, 2), config())
