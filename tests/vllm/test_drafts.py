"""Speculative decoding: quantized targets and drafts give the target's tokens, and drafts are as good as dense ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from tests.vllm import draft_models as models
from tests.vllm.draft_models import Maker, Model, Written, write
from tests.vllm.engine import Engine

PROMPTS = torch.randint(3, models.VOCABULARY, (8, 10), generator=torch.Generator().manual_seed(5)).tolist()
EXACT = {"dtype": "float32", "disable_log_stats": False}  # so that quantized and dense twins agree on every token
# All linear layers but those that vLLM never quantizes, and routers.
LAYERS = r"(?!.*(eh|input|linear)_proj|.*gate$).*(layers|midlayer|mtp_block)\..*(_proj.*|w\d)"
ALL = rf"{LAYERS}|fc|mtp\.fc|lm_head"


class Method(NamedTuple):
    """A way of drafting, and models to test it with."""

    name: str
    tokens: int  # that are drafted at once
    target: Callable[[Maker], Model]
    draft: Callable[[Maker], Model] | None = None  # None: it is inside the target
    layers: str = LAYERS  # of the target, that are quantized


METHODS = {
    "draft model": Method("draft_model", 3, models.llama, lambda maker: models.llama(maker, 1)),
    "draft model with experts": Method("draft_model", 2, models.mixtral, lambda maker: models.mixtral(maker, 1)),
    "eagle": Method("eagle", 2, models.llama, models.eagle),
    "eagle3": Method("eagle3", 1, models.llama, models.eagle3),
    "mtp, mimo": Method("mtp", 1, models.mimo),
    "mtp, glm4_moe": Method("mtp", 1, models.glm4_moe, layers=ALL),
    "mtp, ernie4_5_moe": Method("mtp", 1, models.ernie4_5_moe),
    "mtp, qwen3_next": Method("mtp", 1, models.qwen3_next, layers=rf"{LAYERS}|mtp\.fc"),
    "mtp, deepseek_v3": Method("mtp", 1, models.deepseek_v3, layers=ALL),
}
IN_SHORT = ("draft model", "eagle3", "mtp, glm4_moe")


class Drafts:
    """Runs models with drafts.

    Args:
        folder: for the models.
    """

    def __init__(self, engine: Engine, folder: Path) -> None:
        self.engine, self._folder = engine, folder
        self._written: dict[object, Written] = {}
        self._tokens: dict[Path, list[list[int]]] = {}

    def target(self, name: str, layers: str | None = None, seed: int = 0, **settings: Any) -> Written:
        """Of a method, with some ``layers`` quantized."""
        method = METHODS[name]
        return self._write(method.target, method.layers if layers is None else layers, seed, settings)

    def draft(self, name: str, layers: str = ALL, **settings: Any) -> Written | None:
        """Of a method; None where it is inside the target."""
        make = METHODS[name].draft
        return None if make is None else self._write(make, layers, 0, settings)

    def _write(self, make: Callable[[Maker], Model], layers: str, seed: int, settings: dict[str, Any]) -> Written:
        key = (make, layers, seed, str(settings))
        if key not in self._written:
            folder = self._folder / str(len(self._written))
            self._written[key] = write(folder, *make(Maker(seed)), layers, settings)
        return self._written[key]

    def alone(self, target: Path) -> list[list[int]]:
        """Tokens of ``target`` without a draft."""
        if target not in self._tokens:
            self._tokens[target] = self.engine.tokens(target, PROMPTS, 48, **_how(target))
        return self._tokens[target]

    def run(self, name: str, target: Path, draft: Path | None, **options: Any) -> tuple[list[list[int]], list[int]]:
        """Tokens, and how often was drafted and how much was accepted at each position."""
        method = METHODS[name]
        how: dict[str, Any] = {"method": method.name, "num_speculative_tokens": method.tokens}
        if draft is not None:
            how |= {"model": str(draft), "draft_tensor_parallel_size": self.engine.ranks}
        tokens = self.engine.tokens(target, PROMPTS, 48, speculative_config=how, **{**_how(target), **options})
        print(f"{name}: {target.name} {draft and draft.name} {options} {self.engine.drafted}")  # pytest -rP shows it
        return tokens, self.engine.drafted


def _how(target: Path) -> dict[str, Any]:
    return {**EXACT, "quantization": "gptq" if target.name == "quantized" else None}


@pytest.fixture(scope="module")
def drafts(start_engine: Callable[..., Engine], tmp_path_factory: pytest.TempPathFactory) -> Drafts:
    return Drafts(start_engine(), tmp_path_factory.mktemp("drafts"))


def in_short(names: Iterable[str]) -> list[Any]:
    return [name if name in IN_SHORT else pytest.param(name, marks=pytest.mark.slow) for name in names]


def check(drafts: Drafts, name: str, target: Written, draft: Written | None) -> None:
    """Quantized models give what their dense twins give."""
    found = drafts.run(name, target.quantized, draft and draft.quantized)
    assert found == drafts.run(name, target.dense, draft and draft.dense)
    tokens, (times, accepted, *_) = found
    assert 0.2 * times < accepted < times  # neither by chance nor always: other values would show
    if name != "mtp, deepseek_v3":  # vLLM itself gives other tokens with any draft, dense ones too
        assert tokens == drafts.alone(target.quantized)


@pytest.mark.parametrize("name", in_short(METHODS))
def test_a_quantized_draft_is_as_good_as_its_dense_twin(drafts: Drafts, name: str) -> None:
    check(drafts, name, drafts.target(name), drafts.draft(name))


# As the layers of a draft's own file are called: rules that are anchored must find them there.
PARTLY: dict[str, tuple[str | None, str, dict[str, Any]]] = {
    "draft model": (None, r"model\.layers.*(q|k|o|gate)_proj|lm_head", {"-:^model.*(v|up|down)_proj": {}}),
    "eagle": (None, r"layers.*(q|v|down)_proj", {r"-:^layers\.0\.(.*(k|o)_proj|mlp.(gate|up))": {}, "-:^fc": {}}),
    "eagle3": (None, r"midlayer.*(q|v|down)_proj|fc", {"-:^midlayer.*(k|o|gate|up)_proj": {}, "-:^lm_head": {}}),
    "mtp, glm4_moe": (r"model\.layers\.2.*(k_proj|experts\.[02]\..*_proj)|lm_head", "", {}),
    "mtp, qwen3_next": (r".*layers\.0\..*(k_proj|experts.*_proj)", "", {}),
    "mtp, mimo": (r"model\.mtp_layers.*(q|k|down)_proj", "", {}),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PARTLY)
def test_some_layers_of_a_draft_are_quantized(drafts: Drafts, name: str) -> None:
    target, draft, rules = PARTLY[name]
    check(drafts, name, drafts.target(name, target), drafts.draft(name, draft, dynamic=rules))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["draft model", "eagle3"])
def test_one_of_target_and_draft_is_quantized(drafts: Drafts, name: str) -> None:
    target, draft = drafts.target(name), drafts.draft(name)
    assert draft is not None
    expected = drafts.run(name, target.dense, draft.dense)
    assert drafts.run(name, target.quantized, draft.dense) == expected
    assert drafts.run(name, target.dense, draft.quantized) == expected


@pytest.mark.slow
def test_all_tokens_of_the_target_as_its_own_draft_are_accepted(drafts: Drafts) -> None:
    target = drafts.target("draft model", ALL).quantized
    tokens, (times, *accepted) = drafts.run("draft model", target, target)
    assert tokens == drafts.alone(target)
    assert accepted == [times] * 3


@pytest.mark.parametrize("name", ["mtp, glm4_moe", pytest.param("draft model", marks=pytest.mark.slow)])
def test_a_target_with_a_draft_is_loaded_again(drafts: Drafts, name: str) -> None:
    """vLLM does not load the draft again."""
    first, other, draft = drafts.target(name), drafts.target(name, seed=1), drafts.draft(name)
    before = drafts.run(name, first.quantized, draft and draft.quantized)
    assert drafts.run(name, first.quantized, draft and draft.quantized, reload={"path": None}) == before
    there = drafts.run(name, first.quantized, draft and draft.quantized, reload={"path": str(other.quantized)})
    assert there[0] == drafts.alone(other.quantized)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["draft model", "eagle3", "mtp, glm4_moe"])
def test_compiled_drafts_are_as_good(drafts: Drafts, name: str) -> None:
    target, draft = drafts.target(name), drafts.draft(name)
    expected = drafts.run(name, target.quantized, draft and draft.quantized)
    assert drafts.run(name, target.quantized, draft and draft.quantized, enforce_eager=False) == expected


@pytest.mark.slow
@pytest.mark.parametrize("name", ["draft model", "eagle3", "mtp, glm4_moe"])
def test_ranks_share_drafts(drafts: Drafts, pair: Engine, tmp_path: Path, name: str) -> None:
    target, draft = drafts.target(name), drafts.draft(name)
    expected = drafts.run(name, target.quantized, draft and draft.quantized)
    assert Drafts(pair, tmp_path).run(name, target.quantized, draft and draft.quantized) == expected


def test_a_draft_in_the_targets_checkpoint_has_names_of_its_own(tmp_path: Path) -> None:
    from gptq_vllm.compat import WeightsMapper
    from gptq_vllm.config import GPTQBackendConfig

    folder = write(tmp_path, *models.qwen3_next(Maker()), LAYERS).quantized
    config = GPTQBackendConfig.from_config({"bits": 4})
    config.maybe_update_config(str(folder))
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"model.": "language_model.model.", "mtp.": None}))
    target = config.stored
    assert target.checkpoint.stored_name("language_model.model.layers.1.mlp.gate") == "model.layers.1.mlp.gate"
    assert target.checkpoint.stored_name("mtp.layers.0.self_attn.k_proj") is None
    target.report.loaded(None, ["cpu"])
    config.apply_vllm_mapper(WeightsMapper(orig_to_new_prefix={"mtp.layers.": "model.layers.2."}))
    draft = config.stored
    assert draft.checkpoint.stored_name("model.layers.2.0.self_attn.k_proj") == "mtp.layers.0.self_attn.k_proj"
    assert target.checkpoint.stored_name("model.layers.2.0.self_attn.k_proj") is None


@pytest.mark.slow
def test_tokens_from_the_prompt_are_drafts_too(start_engine: Callable[..., Engine], drafts: Drafts) -> None:
    """In a process of its own: what vLLM imports for it breaks later engines of vLLM 0.32 in the same process."""
    target = drafts.target("draft model").quantized
    how = {"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 3, "prompt_lookup_min": 1}
    tokens = start_engine().tokens(target, PROMPTS, 48, speculative_config=how, **_how(target))
    assert tokens == drafts.alone(target)
