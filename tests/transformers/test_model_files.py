"""What a folder holds beside weights, config and tokenizer is used with the checkpoint, too."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from gptq_backend import QuantizeConfig
from gptq_transformers import quantize

CONFIG = QuantizeConfig(bits=4, group_size=32)
POOLING = {"pooling_mode_lasttoken": True}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
    {"idx": 2, "name": "2", "path": "../secret", "type": "sentence_transformers.models.Dense"},
]
BESIDE = {
    "modules.json": json.dumps(MODULES),
    "1_Pooling/config.json": json.dumps(POOLING),
    "sentence_bert_config.json": "{}",
    "preprocessor_config.json": "{}",
}


@pytest.fixture
def source(original: Path, tmp_path: Path) -> Path:
    folder = shutil.copytree(original, tmp_path / "models" / "source")
    for name, content in BESIDE.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(content)
    (tmp_path / "models" / "secret").mkdir()
    (tmp_path / "models" / "secret" / "config.json").write_text("{}")
    return folder


def test_pooling_and_processors_come_with_the_checkpoint(source: Path, tmp_path: Path) -> None:
    quantize(source, CONFIG, None, output=tmp_path / "results" / "out")
    for name, content in BESIDE.items():
        assert (tmp_path / "results" / "out" / name).read_text() == content
    assert [path.name for path in (tmp_path / "results").iterdir()] == ["out"]


@pytest.mark.parametrize("content", ["{", "[" * 20_000, "[1]", "{}", '[{"path": null}]'])
def test_damaged_modules_do_not_break_a_run_at_its_end(source: Path, tmp_path: Path, content: str) -> None:
    (source / "modules.json").write_text(content)
    quantize(source, CONFIG, None, output=tmp_path / "out")
    assert (tmp_path / "out" / "modules.json").read_text() == content


def test_a_tokenizer_that_cannot_be_loaded_is_named(
    source: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (source / "tokenizer.json").write_text("{")
    quantize(source, CONFIG, None, output=tmp_path / "out")
    assert "the tokenizer of" in caplog.text
    assert not (tmp_path / "out" / "tokenizer.json").exists()
