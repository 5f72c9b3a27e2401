"""Budgets of real architectures: the files have the size that was predicted, and readers serve what was chosen."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from gptq_backend import ConfigError, QuantLinear
from gptq_backend.budget import BudgetPlan
from gptq_transformers import budget as spending
from gptq_transformers import quantize
from tests.toy import listener
from tests.transformers.checkpoints import load, tiny
from tests.transformers.kinds import KINDS, samples, save

KINDS_OF_MODEL: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "llama, biased": ("llama", {"attention_bias": True}),
    "gpt2": ("gpt2", {}),
    "phi3": ("phi3", {}),
    "gemma3": ("gemma3", {}),
    "mixtral": ("mixtral", {}),
}
SETTINGS = {"bits": 4, "group_size": 32, "quality": "fast"}


def data() -> torch.Tensor:
    return torch.randint(3, 259, (16, 24), generator=torch.Generator().manual_seed(2))


def spend(source: Any, out: Path, **target: Any) -> BudgetPlan:
    settings = target.pop("settings", SETTINGS)
    plans: list[BudgetPlan] = []
    quantize(source, settings, data(), output=out, events=listener(budget_planned=plans.append), **target)
    return plans[0]


def size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


@pytest.fixture(params=KINDS_OF_MODEL)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    kind, changes = KINDS_OF_MODEL[request.param]
    tiny(kind, **changes).to(torch.bfloat16).save_pretrained(tmp_path / "original")
    return tmp_path / "original"


def test_files_have_the_size_that_was_predicted_and_load(folder: Path, tmp_path: Path) -> None:
    least = None
    try:
        spend(folder, tmp_path / "none", target_size=100)
    except ConfigError as error:
        least = int(str(error).split("take ")[1].split(" ")[0])
    assert least is not None
    for target in (least, int(least * 1.15)):
        out = tmp_path / str(target)
        plan = spend(folder, out, target_size=target)
        assert size(out) == pytest.approx(plan.nbytes, rel=0.005)
        assert size(out) <= target
        layers = {name: each for name, each in load(out).named_modules() if isinstance(each, QuantLinear)}
        spec = {name: (each.spec.bits, each.spec.group_size) for name, each in layers.items()}
        chosen = {name: (each.bits, each.group_size) for each in plan.groups for name in each.layers}
        if plan.embed_bits == 16 and not any("experts" in name for name in chosen):
            assert spec == chosen


def test_a_loaded_model_and_its_folder_give_the_same_choice(tmp_path: Path) -> None:
    model = tiny("llama").to(torch.bfloat16)
    model.save_pretrained(tmp_path / "original")
    streamed = spend(tmp_path / "original", tmp_path / "a", target_bits=3.2)
    loaded = spend(load(tmp_path / "original", dtype=torch.bfloat16), tmp_path / "b", target_bits=3.2)
    assert streamed.groups == loaded.groups
    assert streamed.layer_bits <= 3.2
    assert streamed.embed_bits == 16


def test_an_embedding_whose_bits_are_given_keeps_them(tmp_path: Path) -> None:
    tiny("llama", tie_word_embeddings=True).to(torch.bfloat16).save_pretrained(tmp_path / "original")
    settings = {**SETTINGS, "embed_bits": 8}
    plan = spend(tmp_path / "original", tmp_path / "out", target_size="90KB", settings=settings)
    assert plan.embed_bits == 8
    assert size(tmp_path / "out") == pytest.approx(plan.nbytes, rel=0.005)


@pytest.mark.parametrize("name", ["Qwen3ForSequenceClassification", "LlavaForConditionalGeneration"])
def test_other_models_that_predict_something_have_budgets_too(name: str, tmp_path: Path) -> None:
    make, _ = KINDS[name]
    source = save(tmp_path / "original", name, make())
    plans: list[BudgetPlan] = []
    events = listener(budget_planned=plans.append)
    quantize(source, SETTINGS, samples(), output=tmp_path / "out", target_bits=4.3, events=events)
    assert plans[0].divergence > 0
    assert plans[0].layer_bits <= 4.3


def test_a_model_that_memory_does_not_hold_is_refused_before_it_is_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny("llama").save_pretrained(tmp_path / "original")
    monkeypatch.setattr(spending, "free_bytes", lambda device: 1000)
    with pytest.raises(ConfigError, match=r"measuring the whole model in float32.*0\.0 GB are free"):
        spend(tmp_path / "original", tmp_path / "out", target_bits=4.0)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("target", [{"target_size": "3 apples"}, {"target_bits": 4.0, "target_size": "1MB"}])
def test_nonsense_is_refused_before_the_work(tmp_path: Path, target: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="target_size="):
        quantize(tmp_path / "nothing", SETTINGS, data(), output=tmp_path / "out", **target)
