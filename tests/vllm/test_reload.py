"""Weights are held once, go when the engine goes, and can be loaded again while it lives."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.vllm.engine import Engine, EngineError

CHECKPOINTS = Path(__file__).parents[1] / "data" / "checkpoints"
SAME = ["llama-4-32-sym", "llama-4-64-actorder", "phi3-4-32", "mixtral-4-32", "qwen3_moe-4-32"]
LLAMAS = ["llama-3-32-sym", "llama-4-32-asym-v2", "llama-4-64-actorder", "llama-dynamic"]


def expected(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids, and log-probabilities of what follows each."""
    file = load_file(CHECKPOINTS / f"{name}.expected.safetensors")
    return file["input_ids"][0], file["logits"][0].float().log_softmax(-1)[:-1]


def distance(engine: Engine, folder: str, name: str, **how: object) -> float:
    """Mean absolute difference of the log-probabilities of the engine that was loaded from ``folder``."""
    ids, wanted = expected(name)
    return float((engine.logprobs(CHECKPOINTS / folder, ids, **how) - wanted).abs().mean())


@pytest.fixture(scope="module")
def engine(start_engine: Callable[..., Engine]) -> Engine:
    return start_engine()


@pytest.mark.parametrize("name", SAME)
def test_the_same_weights_are_loaded_again(engine: Engine, name: str) -> None:
    before = distance(engine, name, name)
    assert before < 0.02
    for _ in range(2):
        assert distance(engine, name, name, reload={"path": None}) == before


@pytest.mark.parametrize("name", LLAMAS)
def test_weights_of_another_folder_and_form_are_loaded(engine: Engine, name: str) -> None:
    first = "llama-4-32-sym"
    assert distance(engine, first, first) < 0.02
    assert distance(engine, first, name, reload={"path": str(CHECKPOINTS / name)}) < 0.02
    assert distance(engine, first, first, reload={"path": str(CHECKPOINTS / first)}) < 0.02


# Where a reload stops: vLLM cannot open a file, this package refuses the settings or a tensor, or a layer is not whole.
def _cut_file(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    file = folder / "model-00002-of-00002.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])


def _spoil_settings(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    for file in ("config.json", "quantize_config.json"):
        text = (folder / file).read_text()
        (folder / file).write_text(text.replace('"bits": ', '"bits": 1'))


def _spoil_groups(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    name = [name for name in sorted(tensors) if name.endswith("g_idx")][-1]
    tensors[name] = torch.full_like(tensors[name], 1000)


def _lose_tensor(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    del tensors[[name for name in sorted(tensors) if name.endswith("v_proj.scales")][-1]]


def _lose_layer(tensors: dict[str, torch.Tensor], folder: Path) -> None:
    name = [name for name in sorted(tensors) if name.endswith("k_proj.scales")][-1].removesuffix(".scales")
    for part in ("qweight", "qzeros", "scales", "g_idx"):
        del tensors[f"{name}.{part}"]


DAMAGES = {
    "in a file": _cut_file,
    "in the settings": _spoil_settings,
    "at a tensor": _spoil_groups,
    "at a part": _lose_tensor,
    "at a layer": _lose_layer,
}


def damaged(folder: Path, name: str, damage: str) -> Path:
    """Write checkpoint ``name`` in two files, of which the second begins in the middle of a layer, and spoil it."""
    shutil.copytree(CHECKPOINTS / name, folder)
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if damage != "in a file":
        DAMAGES[damage](tensors, folder)
    names = sorted(tensors)
    middle = next(i for i in range(len(names) // 2, len(names)) if names[i].endswith("q_proj.scales"))
    files = {}
    for i, part in enumerate((names[:middle], names[middle:]), 1):
        file = f"model-0000{i}-of-00002.safetensors"
        files |= dict.fromkeys(part, file)
        save_file({each: tensors[each] for each in part}, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    if damage == "in a file":
        DAMAGES[damage](tensors, folder)
    return folder


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    "name", ["llama-4-64-actorder", *(pytest.param(n, marks=pytest.mark.slow) for n in ("qwen2-4-64", "mixtral-4-32"))]
)
def test_weights_are_loaded_after_a_reload_that_was_aborted(
    engine: Engine, name: str, damage: str, tmp_path: Path
) -> None:
    before = distance(engine, name, name)
    assert before < 0.02
    bad = str(damaged(tmp_path / "bad", name, damage))
    for aborted in ([bad], [bad, bad]):
        assert distance(engine, name, name, reload={"path": str(CHECKPOINTS / name), "aborted": aborted}) == before


def test_weights_of_another_form_are_loaded_after_a_reload_that_was_aborted(engine: Engine, tmp_path: Path) -> None:
    first, then = "llama-4-32-sym", "llama-3-32-sym"
    assert distance(engine, first, first, reload={"path": str(CHECKPOINTS / first)}) < 0.02
    bad = str(damaged(tmp_path / "bad", "llama-4-32-asym-v2", "at a tensor"))
    assert distance(engine, first, then, reload={"path": str(CHECKPOINTS / then), "aborted": [bad]}) < 0.02


def test_a_folder_is_loaded_once_it_is_repaired(engine: Engine, tmp_path: Path) -> None:
    name = "llama-4-64-actorder"
    before = distance(engine, name, name, reload={"path": str(CHECKPOINTS / name)})
    for i, damage in enumerate(DAMAGES):
        bad, repaired = damaged(tmp_path / f"{i}", name, damage), tmp_path / f"repaired {i}"
        reload = {"path": str(bad), "aborted": [str(bad)], "repaired": str(repaired)}
        shutil.copytree(CHECKPOINTS / name, repaired)
        assert distance(engine, name, name, reload=reload) == before


def test_a_folder_with_other_weights_than_before_is_loaded(engine: Engine, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(CHECKPOINTS / LLAMAS[0], folder)
    for name in LLAMAS:
        shutil.copytree(CHECKPOINTS / name, folder, dirs_exist_ok=True)
        reload = None if name == LLAMAS[0] else {"path": None}
        assert distance(engine, str(folder), name, reload=reload) < 0.02


@pytest.mark.parametrize("name", ["llama-4-64-actorder", "qwen3_moe-4-32"])
def test_quantized_weights_are_held_once(engine: Engine, name: str) -> None:
    distance(engine, name, name)
    assert engine.held is not None
    assert engine.held["packed"] > 50_000
    assert engine.held["reached"] <= 1.05 * engine.held["packed"]


def test_weights_go_with_their_engine(start_engine: Callable[..., Engine]) -> None:
    engine = start_engine()
    for name in ("llama-4-32-sym", "qwen3_moe-4-32", "llama-4-32-sym"):
        distance(engine, name, name)
        assert engine.left == 0, name


@pytest.mark.slow
def test_ranks_load_their_shares_again(start_engine: Callable[..., Engine]) -> None:
    engine = start_engine(ranks=2)
    for first, then in (("llama-4-64-actorder", "llama-4-32-sym"), ("qwen3_moe-4-32", "qwen3_moe-4-32")):
        assert distance(engine, first, first) < 0.02
        assert distance(engine, first, then, reload={"path": str(CHECKPOINTS / then)}) < 0.02


@pytest.mark.slow
def test_a_compiled_model_takes_weights_of_its_form_and_no_others(start_engine: Callable[..., Engine]) -> None:
    engine, name = start_engine(), "llama-4-64-actorder"
    before = distance(engine, name, name, enforce_eager=False)
    assert before < 0.02
    assert distance(engine, name, name, enforce_eager=False, reload={"path": None}) == before
    with pytest.raises(EngineError, match="another form than those before .* start vLLM anew"):
        distance(engine, name, name, enforce_eager=False, reload={"path": str(CHECKPOINTS / "llama-3-32-sym")})
