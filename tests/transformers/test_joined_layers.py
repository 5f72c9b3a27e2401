"""Models of transformers 5 whose published checkpoints join layers that the model has apart, like q, k and v."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from transformers import AutoConfig, AutoModel, PreTrainedModel

import gptq_transformers
from gptq_backend import QuantizeConfig, QuantLinear
from tests.transformers.checkpoints import distance, ids

SIZES: dict[str, Any] = {
    "vocab_size": 259,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
SKIP_QUERIES = {"-:.*0\\..*q_proj$": {}}


def _model(kind: str) -> PreTrainedModel:
    if kind not in transformers.CONFIG_MAPPING:
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(0)
    return AutoModel.from_config(AutoConfig.for_model(kind, **SIZES)).eval()


@torch.no_grad()
def _states(model: PreTrainedModel) -> torch.Tensor:
    return model(input_ids=ids()).last_hidden_state.float()


@pytest.mark.parametrize("dynamic", [None, SKIP_QUERIES], ids=["all", "some"])
@pytest.mark.parametrize("from_folder", [True, False])
@pytest.mark.parametrize("kind", ["nomic_bert", "jina_embeddings_v3"])
def test_quantized_layers_that_checkpoints_join_are_written_apart(
    tmp_path: Path, kind: str, from_folder: bool, dynamic: Any
) -> None:
    model = _model(kind)
    dense = _states(model)
    model.save_pretrained(tmp_path / "original")
    source = tmp_path / "original" if from_folder else model
    config = QuantizeConfig(bits=8, group_size=32, dynamic=dynamic)

    quantized, _ = gptq_transformers.quantize(source, config, None, output=tmp_path / "out")

    loaded = AutoModel.from_pretrained(tmp_path / "out", dtype=torch.float32)
    count = sum(isinstance(module, QuantLinear) for module in loaded.modules())
    assert count == sum(isinstance(module, QuantLinear) for module in quantized.modules()) > 0
    assert distance(_states(loaded), dense) < 0.05
    torch.testing.assert_close(_states(loaded), _states(quantized), rtol=1e-4, atol=1e-4)
    with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "Wqkv" in key and ".1." in key]  # noqa: SIM118

    loaded.save_pretrained(tmp_path / "again")
    again = AutoModel.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert torch.equal(_states(again), _states(loaded))
