"""Experts that a checkpoint calls otherwise than vLLM's model does."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from torch import Tensor

from gptq_backend import QuantizeConfig
from gptq_vllm.checkpoint import Checkpoint
from tests.transformers.checkpoints import ids, tiny, write
from tests.transformers.test_expert_layouts import joined, renamed
from tests.vllm.engine import Engine, EngineError
from tests.vllm.test_offline import BOUND, distance


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Tensor]:
    folder = tmp_path_factory.mktemp("mixtral") / "model"
    return folder, write(folder, tiny("mixtral"), QuantizeConfig(group_size=32, desc_act=True))[0]


def rewritten(source: Path, folder: Path, change) -> Path:  # type: ignore[no-untyped-def]
    shutil.copytree(source, folder)
    tensors = change(load_file(folder / "model.safetensors"))
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors", {"format": "pt"})
    return folder


def in_mlp(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {re.sub(r"\.block_sparse_moe\.", ".mlp.", key): value for key, value in tensors.items()}


@pytest.mark.parametrize(
    ("template", "spelling", "parent"),
    [
        ("{n}.{p}", ("gate_proj", "up_proj", "down_proj"), "mlp"),  # as GPTQModel 7.7 writes it
        pytest.param("{p}.{n}", ("w1", "v1", "w2"), "block_sparse_moe", marks=pytest.mark.slow),
        pytest.param("{p}.{n}", ("gate_projs", "up_projs", "down_projs"), "mlp", marks=pytest.mark.slow),
    ],
)
def test_experts_by_any_known_name_give_the_same_logprobs(
    engine: Engine, mixtral: tuple[Path, Tensor], template: str, spelling: tuple[str, ...], parent: str, tmp_path: Path
) -> None:
    source, expected = mixtral

    def change(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        tensors = renamed(tensors, template, spelling, "mixtral")
        return in_mlp(tensors) if parent == "mlp" else tensors

    folder = rewritten(source, tmp_path / "model", change)
    assert distance(engine.logprobs(folder, ids()[0]), expected) < BOUND


def test_experts_that_have_other_names_after_a_reload_are_found(
    engine: Engine, mixtral: tuple[Path, Tensor], tmp_path: Path
) -> None:
    source, expected = mixtral
    spelling = ("gate_proj", "up_proj", "down_proj")
    other = rewritten(source, tmp_path / "other", lambda t: in_mlp(renamed(t, "{n}.{p}", spelling, "mixtral")))
    for folder in (other, source, other):
        assert distance(engine.logprobs(source, ids()[0], reload={"path": str(folder)}), expected) < BOUND


@pytest.mark.parametrize("layout", ["unknown", "joined"])
def test_experts_that_vllm_cannot_hold_are_refused(
    engine: Engine, mixtral: tuple[Path, Tensor], layout: str, tmp_path: Path
) -> None:
    if layout == "unknown":
        message = r"calls the layers of its experts \{\}\.alpha"
        folder = rewritten(
            mixtral[0], tmp_path / "model", lambda t: renamed(t, "{n}.{p}", ("alpha", "beta", "gamma"), "mixtral")
        )
    else:
        message = r"calls the layers of its experts \{\}\.gate_up_proj"
        folder = rewritten(mixtral[0], tmp_path / "model", lambda t: joined(t, "mixtral", False, "{n}.{p}"))
    with pytest.raises(EngineError, match=message):
        engine.logprobs(folder, ids()[0])


def test_two_sets_of_weights_are_refused_where_frameworks_read_different_ones(
    mixtral: tuple[Path, Tensor], tmp_path: Path
) -> None:
    from gptq_backend import CheckpointError

    folder = shutil.copytree(mixtral[0], tmp_path / "model")
    (folder / "model-00001-of-00001.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    keys = load_file(folder / "model.safetensors")
    index = folder / "model.safetensors.index.json"
    index.write_text(f'{{"weight_map": {{"{next(iter(keys))}": "model-00001-of-00001.safetensors"}}}}')
    with pytest.raises(CheckpointError, match="both model.safetensors, which transformers reads, and the shards"):
        Checkpoint(folder, {"bits": 4})
    index.write_text(f'{{"weight_map": {{"{next(iter(keys))}": "model.safetensors"}}}}')
    assert Checkpoint(folder, {"bits": 4}).manifest.keys() == keys.keys()
