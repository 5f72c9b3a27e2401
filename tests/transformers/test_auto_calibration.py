"""``calibration="auto"``: what is in the pool, what is said about it, and what cannot be done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from gptq_backend import CalibrationError, ConfigError
from gptq_transformers import auto_calibration, memory, quantize
from gptq_transformers.auto_calibration import MODEL, USER, choose, packaged_texts
from tests.toy import listener

ROOT = Path(__file__).parents[2]
TOKENIZER = ROOT / "tests" / "data" / "checkpoints" / "llama-4-32-sym" / "tokenizer.json"
SMALL = {"samples": 8, "seqlen": 32}
CONFIG = {"bits": 4, "group_size": 32}


def tokenizer() -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_file=str(TOKENIZER), bos_token="!")


def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
    )
    return LlamaForCausalLM(config).eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("auto") / "original"
    model().to(torch.bfloat16).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    return folder


def not_now(*_: Any) -> Any:
    raise CalibrationError("not now")


def test_packaged_texts_are_there_named_in_the_readme_and_go_into_the_wheel() -> None:
    folder = Path(auto_calibration.__file__).parent / "calibration_text"
    texts = packaged_texts()
    assert {"code", "dialogue", "encyclopedia", "prose"} <= texts.keys()
    for name, text in texts.items():
        assert len(text) > 40_000, name
        assert f"`{name}.txt`" in (folder / "README.md").read_text()
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    packed = {path for pattern in patterns["gptq_transformers"] for path in folder.parent.glob(pattern)}
    assert packed == set(folder.iterdir())


def test_every_source_is_chosen_from_and_no_window_is_used_and_held_out() -> None:
    found = choose(model(), tokenizer(), samples=16, seqlen=32)
    assert found.sources.keys() == {*packaged_texts(), MODEL}
    assert not found.left_out
    assert found.samples.shape[1] == found.held_out.shape[1] == 32
    assert len(found.samples) <= 16
    assert sum(source["chosen"] for source in found.sources.values()) == len(found.samples)
    assert sum(source["weight"] for source in found.sources.values()) == pytest.approx(1)
    assert not {tuple(row.tolist()) for row in found.samples} & {tuple(row.tolist()) for row in found.held_out}


def test_the_choice_is_the_same_again_and_another_with_another_seed() -> None:
    first, again, other = (choose(model(), tokenizer(), **SMALL, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(first.samples, again.samples)
    assert first.report() == again.report()
    assert first.samples.shape != other.samples.shape or not torch.equal(first.samples, other.samples)


def test_the_callers_random_state_and_model_stay_as_they_were() -> None:
    original = model()
    before = {name: tensor.clone() for name, tensor in original.state_dict().items()}
    torch.manual_seed(123)
    state = torch.get_rng_state()
    choose(original, tokenizer(), **SMALL)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in original.state_dict().items())


def test_the_users_text_weighs_half_and_is_chosen() -> None:
    text = " ".join(str(i) for i in range(2000))
    found = choose(model(), tokenizer(), text, samples=16, seqlen=32)
    assert found.sources[USER]["weight"] == 0.5
    assert found.sources[USER]["chosen"] >= max(source["chosen"] for source in found.sources.values())


def test_a_folder_gives_the_same_choice_whole_and_block_by_block(folder: Path, monkeypatch: Any) -> None:
    whole = choose(folder, tokenizer(), **SMALL)
    monkeypatch.setattr(auto_calibration, "_generated", not_now)
    mute = choose(folder, tokenizer(), **SMALL)
    monkeypatch.setattr(memory.psutil, "virtual_memory", lambda: type("Memory", (), {"available": 1})())
    streamed = choose(folder, tokenizer(), **SMALL)
    assert MODEL in whole.sources
    assert torch.equal(streamed.samples, mute.samples)
    assert "half of the free" in streamed.left_out[MODEL]


def test_a_model_that_cannot_generate_is_left_out_and_named(caplog: pytest.LogCaptureFixture) -> None:
    class Mute(LlamaForCausalLM):
        @classmethod
        def can_generate(cls) -> bool:
            return False

    class Broken(LlamaForCausalLM):
        def generate(self, *_: Any, **__: Any) -> Any:
            raise ValueError("no words\nand no more")

    for kind, reason in ((Mute, "Mute cannot generate"), (Broken, "it cannot be sampled from (no words)")):
        caplog.clear()
        found = choose(kind(model().config), tokenizer(), **SMALL)
        assert found.left_out == {MODEL: reason}
        assert reason in caplog.text


@pytest.mark.parametrize("settings", [{"return_dict_in_generate": True}, {"num_return_sequences": 2}, {"num_beams": 2}])
def test_the_models_own_way_to_generate_does_not_matter(settings: dict[str, Any]) -> None:
    odd = model()
    for key, value in settings.items():
        setattr(odd.generation_config, key, value)
    assert torch.equal(choose(odd, tokenizer(), **SMALL).samples, choose(model(), tokenizer(), **SMALL).samples)


def test_windows_longer_than_the_model_takes_are_refused_before_it_generates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_calibration, "_generated", lambda *_: pytest.fail("it generated"))
    with pytest.raises(CalibrationError, match="65 tokens, but the model takes at most 64"):
        choose(model(), tokenizer(), samples=8, seqlen=65)


def test_text_is_generated_in_parts_that_fit_into_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = auto_calibration._generated(model(), tokenizer(), 4, 32, 0)
    monkeypatch.setattr(auto_calibration, "_AT_ONCE", 3)
    parts = auto_calibration._generated(model(), tokenizer(), 4, 32, 0)
    assert whole.shape == parts.shape == (4, 32)
    assert torch.equal(whole[:, 0], parts[:, 0])


def test_a_model_that_generates_too_little_is_left_out() -> None:
    class Short(LlamaForCausalLM):
        def generate(self, *_: Any, **__: Any) -> Any:
            return torch.zeros(1, 3, dtype=torch.long)

    assert MODEL in choose(Short(model().config), tokenizer(), **SMALL).left_out


@pytest.mark.parametrize("prefix", [[], [7]])
def test_the_models_text_begins_as_the_tokenizer_begins_a_text(prefix: list[int]) -> None:
    class Tokenizer:
        bos_token_id = 7

        def __call__(self, text: str) -> dict[str, list[int]]:
            return {"input_ids": [*prefix, *text.encode()]}

    found = auto_calibration._generated(model(), Tokenizer(), 6, 8, 0)
    assert isinstance(found, torch.Tensor)
    assert found.shape == (6, 8)
    assert (found[:: 1 if prefix else 2, 0] == 7).all()
    assert prefix or not (found[:, 0] == 7).all()


def test_text_that_is_too_short_is_refused() -> None:
    with pytest.raises(
        CalibrationError, match=r"at least two windows of seqlen=32 tokens from your text, but it has 1"
    ):
        choose(model(), tokenizer(), "x" * 50, **SMALL)
    with pytest.raises(CalibrationError, match="empty"):
        choose(model(), tokenizer(), ["", "  "], **SMALL)


def test_an_empty_pool_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(auto_calibration, "packaged_texts", lambda: {"tiny": "x"})
    monkeypatch.setattr(auto_calibration, "_generated", not_now)
    with pytest.raises(CalibrationError, match="pool is empty"):
        choose(model(), tokenizer(), **SMALL)


@pytest.mark.parametrize("sizes", [{"samples": 0, "seqlen": 32}, {"samples": 4, "seqlen": 0}])
def test_sizes_that_mean_nothing_are_refused(sizes: dict[str, int]) -> None:
    with pytest.raises(CalibrationError, match="must be positive"):
        choose(model(), tokenizer(), **sizes)


def test_no_tokenizer_is_refused_before_the_work(tmp_path: Path) -> None:
    model().save_pretrained(tmp_path / "bare")
    with pytest.raises(CalibrationError, match="no tokenizer could be loaded"):
        quantize(tmp_path / "bare", CONFIG, "auto", **SMALL)


def test_text_without_auto_is_refused() -> None:
    with pytest.raises(CalibrationError, match="calibration=text"):
        quantize(model(), CONFIG, None, text="some", tokenizer=tokenizer())


def test_a_quantized_model_is_refused_before_the_work(folder: Path, tmp_path: Path) -> None:
    quantize(folder, CONFIG, None, output=tmp_path / "out")
    with pytest.raises(ConfigError, match="quantized already"):
        quantize(tmp_path / "out", CONFIG, "auto", **SMALL)


def test_quantize_uses_the_choice_and_tells_it(folder: Path, offline: None) -> None:
    chosen: list[auto_calibration.Choice] = []
    _, report = quantize(folder, CONFIG, "auto", **SMALL, events=listener(calibration_chosen=chosen.append))
    assert {layer.tokens for layer in report.layers} == {chosen[0].samples.numel()}
