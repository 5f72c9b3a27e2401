"""Names of experts: what the table knows is found among a checkpoint's names, the rest is named in a refusal."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptq_backend import CheckpointError
from gptq_backend.format import expert_names as module
from gptq_backend.format.expert_names import (
    ExpertLayout,
    default_layout,
    expert_layout,
    expert_renaming,
    renamed,
    stored_place,
)

PLACE = "model.layers.3.mlp.experts"
SPELLINGS = [
    *((spelling, True, False) for spelling in module._APART),
    *((spelling, True, True) for spelling in module._JOINED),
    *((spelling, False, False) for spelling in module._UNGATED),
]


@pytest.mark.parametrize(("spelling", "gated", "joined"), SPELLINGS)
@pytest.mark.parametrize("template", ["{}.%s", "%s.{}", "mlp.%s.{}", "{}.mlp.%s"])
def test_every_spelling_is_found_in_every_place(
    spelling: tuple[str, ...], gated: bool, joined: bool, template: str
) -> None:
    paths = tuple(template % name for name in spelling)
    names = [f"{PLACE}.{path.format(i)}" for i in range(4) for path in paths]
    others = ["model.layers.3.mlp.gate", "model.layers.30.mlp.experts.0.odd", "lm_head"]
    assert expert_layout(PLACE, [*others, *names], gated) == ExpertLayout(paths, joined)


def test_no_layout_is_found_where_no_expert_is_a_layer() -> None:
    assert expert_layout(PLACE, ["model.layers.3.mlp.gate", f"{PLACE}.gate_up_proj"], gated=True) is None


def test_an_unknown_layout_is_named_in_one_sentence() -> None:
    with pytest.raises(CheckpointError, match=r"experts: .* calls the layers of its experts \{\}\.alpha, \{\}\.beta"):
        expert_layout(PLACE, [f"{PLACE}.{i}.{name}" for i in range(2) for name in ("alpha", "beta")], gated=True)


@given(
    st.sampled_from(module._APART), st.sampled_from(["mlp", "block_sparse_moe", "feed_forward"]),
    st.sampled_from(["{}.%s", "%s.{}"]), st.sets(st.integers(0, 120), min_size=1, max_size=4),
)  # fmt: skip
def test_a_renaming_turns_all_names_into_the_models(
    spelling: tuple[str, ...], parent: str, template: str, layers: set[int]
) -> None:
    wanted = ExpertLayout(("{}.w1", "{}.w3", "{}.w2"))
    layouts = {f"model.layers.{n}.block_sparse_moe.experts": wanted for n in layers}
    stored = ExpertLayout(tuple(template % name for name in spelling))
    names = {
        f"model.layers.{n}.{parent}.experts.{stored.path(p, e)}": f"model.layers.{n}.block_sparse_moe.experts."
        f"{wanted.path(p, e)}"
        for n in layers for p in range(3) for e in (0, 7, 11)
    }  # fmt: skip
    names |= {f"model.layers.{n}.{parent}.gate": f"model.layers.{n}.block_sparse_moe.gate" for n in layers}
    names |= {"model.layers.500.mlp.gate_proj": "model.layers.500.mlp.gate_proj"}
    renaming = expert_renaming(names, layouts)
    assert {name: renamed(f"{name}.qweight", renaming) for name in names} == {
        name: f"{own}.qweight" for name, own in names.items()
    }
    back = {wanted: own for own, wanted in renaming.items()}
    assert {renamed(f"{own}.qweight", back) for own in names.values()} == {f"{name}.qweight" for name in names}


def test_names_that_are_the_models_are_left_alone() -> None:
    layouts = {PLACE: ExpertLayout(("{}.w1", "{}.w3", "{}.w2"))}
    assert expert_renaming([f"{PLACE}.{i}.{name}" for i in range(2) for name in ("w1", "w2", "w3")], layouts) == {}


def test_other_matrices_than_the_models_are_refused() -> None:
    layouts = {PLACE: ExpertLayout(("{}.w1", "{}.w3", "{}.w2"))}
    with pytest.raises(CheckpointError, match=r"have the matrices \{\}\.gate_up_proj, \{\}\.down_proj, the model's"):
        expert_renaming([f"{PLACE}.0.{name}" for name in ("gate_up_proj", "down_proj")], layouts)


def test_names_of_the_models_own_that_nobody_else_has_are_left_alone() -> None:
    layouts = {PLACE: ExpertLayout(("{}.alpha", "{}.beta", "{}.gamma"))}
    assert expert_renaming([f"{PLACE}.{i}.{name}" for i in range(2) for name in ("alpha", "beta")], layouts) == {}


def test_large_mixtures_are_renamed_in_no_time() -> None:
    layouts = {f"model.layers.{n}.mlp.experts": default_layout(gated=True) for n in range(60)}
    names = [
        f"model.layers.{n}.block_sparse_moe.experts.{e}.{name}"
        for n in range(60) for e in range(128) for name in ("w1", "w2", "w3")
    ]  # fmt: skip
    start = time.process_time()
    renaming = expert_renaming(names, layouts)
    found = [renamed(f"{name}.qweight", renaming) for name in names]
    assert time.process_time() - start < 5  # one pattern per layer, tried on each name, takes ten times as long
    assert found[-1] == "model.layers.59.mlp.experts.127.up_proj.qweight"


def test_experts_of_another_module_in_the_block_are_not_taken() -> None:
    places = ["model.layers.0.mlp.experts", "model.layers.0.moe.experts"]
    names = ["model.layers.0.moe.experts.0.w1"]
    assert stored_place(places[0], names, places) == places[0]
    assert stored_place(places[0], ["model.layers.0.ffn.experts.0.w1"], places) == "model.layers.0.ffn.experts"
