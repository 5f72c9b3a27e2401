"""Bad checkpoints through ``from_pretrained``: one clear sentence, and never a model with random weights in it."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gptq_backend import CheckpointError, ConfigError, QuantizeConfig
from tests.transformers.checkpoints import distance, load, logits, rewrite, stored, tiny, write

LAYER = "model.layers.1.mlp.up_proj"


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("original") / "model"
    write(folder, tiny(), QuantizeConfig(group_size=32, desc_act=True))
    return folder


@pytest.fixture
def folder(original: Path, tmp_path: Path) -> Path:
    for file in original.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    return tmp_path


def _change(name: str, change: Callable[[Tensor], Tensor | None]) -> Callable[[dict[str, Tensor]], Any]:
    def apply(tensors: dict[str, Tensor]) -> None:
        value = change(tensors.pop(name))
        if value is not None:
            tensors[name] = value

    return apply


def _with(value: float) -> Callable[[Tensor], Tensor]:
    def change(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        tensor.view(-1)[3] = value
        return tensor

    return change


BROKEN: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "missing qzeros": (_change(f"{LAYER}.qzeros", lambda t: None), rf"^{LAYER}: qzeros is missing"),
    "missing qweight": (
        _change(f"{LAYER}.qweight", lambda t: None),
        rf"^{LAYER}: (qzeros|g_idx) is stored without qweight",
    ),
    "wrong shape": (_change(f"{LAYER}.qzeros", lambda t: t[:, :-1]), rf"^{LAYER}.qzeros has shape .*expected"),
    "g_idx too large": (_change(f"{LAYER}.g_idx", _with(7)), rf"^{LAYER}.g_idx: values span 0..7, expected 0..1"),
    "g_idx negative": (_change(f"{LAYER}.g_idx", _with(-1)), rf"^{LAYER}.g_idx: values span -1..1"),
    "NaN scales": (_change(f"{LAYER}.scales", _with(float("nan"))), rf"^{LAYER}.scales: 1 values are NaN"),
    "a missing norm": (
        _change("model.layers.0.input_layernorm.weight", lambda t: None),
        r"^model.layers.0.input_layernorm",
    ),
    "a missing embedding": (_change("model.embed_tokens.weight", lambda t: None), r"^model.embed_tokens.weight is not"),
    "a missing final norm": (_change("model.norm.weight", lambda t: None), r"^model.norm.weight is not in"),
    "a missing head": (_change("lm_head.weight", lambda t: None), r"^lm_head.weight is not in"),
    "a short embedding": (
        _change("model.embed_tokens.weight", lambda t: t[:-5]),
        r"^model.embed_tokens.weight: the checkpoint has shape \[254, 64\], the model \[259, 64\]; .*fetch both",
    ),
    "a short norm": (_change("model.norm.weight", lambda t: t[:-1]), r"^model.norm.weight: the checkpoint has shape"),
    "a short head": (_change("lm_head.weight", lambda t: t[:-1]), r"^lm_head.weight: the checkpoint has shape"),
    "no quantized layer": (
        lambda tensors: {key: value for key, value in tensors.items() if "_proj" not in key},
        r"no tensor is called \*.qweight",
    ),
    "a missing layer": (
        lambda tensors: {key: value for key, value in tensors.items() if not key.startswith(LAYER)},
        rf"^{LAYER}.weight is not in the checkpoint",
    ),
}


@pytest.mark.parametrize("damage", BROKEN)
def test_a_broken_checkpoint_is_refused(damage: str, folder: Path) -> None:
    change, message = BROKEN[damage]
    rewrite(folder, change)
    with pytest.raises(CheckpointError, match=message):
        load(folder)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"checkpoint_format": "exotic"}, "checkpoint_format='exotic'"),
        ({"bits": 9}, "bits=9"),
    ],
)
def test_unknown_settings_are_refused(settings: dict[str, Any], message: str, folder: Path) -> None:
    rewrite(folder, **settings)
    with pytest.raises(ConfigError, match=message):
        load(folder)


def test_a_truncated_file_is_refused(folder: Path) -> None:
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    with pytest.raises(
        CheckpointError, match=r"model.safetensors, which has \d+ bytes, cannot be read .*: fetch it again"
    ):
        load(folder)


def test_a_config_of_another_size_is_refused(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["intermediate_size"] = 128
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(
        CheckpointError, match=r"the model .*128.*; config.json and the weights belong to different models"
    ):
        load(folder)


def test_a_new_head_is_allowed(folder: Path) -> None:
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, dtype=torch.float32)
    assert model.score.weight.shape == (3, 64)


def test_a_layer_that_is_stored_twice_is_loaded_quantized(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    expected = logits(load(folder))
    rewrite(folder, lambda tensors: tensors.update({f"{LAYER}.weight": torch.ones(96, 64)}))
    with caplog.at_level(logging.WARNING, "gptq_backend"):
        assert distance(logits(load(folder)), expected) == 0
    assert caplog.text.count("1 layers have both a weight and a qweight") == 1


def test_sizes_may_differ_where_the_user_allows_it(folder: Path) -> None:
    rewrite(folder, _change("lm_head.weight", lambda t: t[:-1]))
    assert load(folder, ignore_mismatched_sizes=True).lm_head.in_features == 64


def test_a_tied_head_does_not_count_as_missing(tmp_path: Path) -> None:
    expected = write(tmp_path, tiny(tie_word_embeddings=True), QuantizeConfig(group_size=32))
    assert "lm_head.weight" not in stored(tmp_path)
    assert distance(logits(load(tmp_path)), expected) < 1e-4


def test_a_missing_embedding_is_refused_also_with_a_tied_head(tmp_path: Path) -> None:
    write(tmp_path, tiny(tie_word_embeddings=True), QuantizeConfig(group_size=32))
    rewrite(tmp_path, _change("model.embed_tokens.weight", lambda t: None))
    with pytest.raises(CheckpointError, match=r"(embed_tokens|lm_head).weight is not in"):
        load(tmp_path)


def test_the_bare_base_model_loads_and_must_be_complete(folder: Path) -> None:
    from transformers import AutoModel

    assert AutoModel.from_pretrained(folder).norm.weight.shape == (64,)
    rewrite(folder, _change("model.norm.weight", lambda t: None))
    with pytest.raises(CheckpointError, match=r"^norm.weight is not in"):
        AutoModel.from_pretrained(folder)


@pytest.mark.parametrize("layers", [0, -1])
def test_a_model_without_the_quantized_layers_is_refused(layers: int, folder: Path) -> None:
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**content, "num_hidden_layers": layers}))
    with pytest.raises(CheckpointError, match=r"has none of the checkpoint's \d+ quantized layers \(model\."):
        load(folder)
