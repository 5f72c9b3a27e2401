"""A config.json that transformers 5 wrote means the same to transformers 4."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from gptq_backend import ConfigError, QuantizeConfig
from gptq_cli.checkpoint import read_checkpoint
from tests.transformers.checkpoints import VERSION_4, distance, load, logits, rewrite, tiny, write

pytestmark = pytest.mark.skipif(not VERSION_4, reason="version 5 reads what it writes")

LLAMA3 = {
    "rope_type": "llama3",
    "factor": 2.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
DEFAULT = {"rope_type": "default"}
# How version 4 has it, and how version 5 does.
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "theta": ("qwen3", {"rope_theta": 500.0}, {"rope_parameters": {**DEFAULT, "rope_theta": 500.0}}),
    "scaled": (
        "llama",
        {"rope_theta": 500.0, "rope_scaling": LLAMA3},
        {"rope_parameters": {**LLAMA3, "rope_theta": 500.0}},
    ),
    "partial": (
        "glm",
        {"rope_theta": 500.0, "partial_rotary_factor": 0.25},
        {"rope_parameters": {**DEFAULT, "rope_theta": 500.0, "partial_rotary_factor": 0.25}},
    ),
    "by kind of attention": (
        "gemma3",
        {"rope_theta": 400.0, "rope_local_base_freq": 100.0, "rope_scaling": {"rope_type": "linear", "factor": 2.0}},
        {
            "rope_parameters": {
                "full_attention": {"rope_type": "linear", "factor": 2.0, "rope_theta": 400.0},
                "sliding_attention": {**DEFAULT, "rope_theta": 100.0},
                "rope_theta": {"global": 1e6, "local": 1e4},
            }
        },
    ),
    "experts": (
        "qwen3_moe",
        {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64},
        {"num_local_experts": 4},
    ),
}


def edit(folder: Path, gone: Any, new: dict[str, Any]) -> None:
    path = folder / "config.json"
    config = {key: value for key, value in json.loads(path.read_text()).items() if key not in gone}
    path.write_text(json.dumps(config | new))


@pytest.mark.parametrize("case", CASES)
def test_newer_settings_give_the_same_logits(case: str, tmp_path: Path) -> None:
    model_type, older, newer = CASES[case]
    layers = {"layer_types": ["sliding_attention", "full_attention"]} if model_type == "gemma3" else {}
    expected = write(tmp_path, tiny(model_type, **layers, **older), QuantizeConfig(group_size=32))
    edit(tmp_path, older.keys() - {"moe_intermediate_size", "num_experts_per_tok"}, newer)
    assert distance(logits(load(tmp_path)), expected) < 1e-5
    assert not read_checkpoint(tmp_path).damaged


def test_what_version_4_cannot_be_told_is_refused(tmp_path: Path) -> None:
    write(tmp_path, tiny("qwen3"), QuantizeConfig(group_size=32))
    kinds = {
        kind: {**DEFAULT, "rope_theta": theta} for kind, theta in (("full_attention", 4e2), ("sliding_attention", 1e2))
    }
    edit(tmp_path, ("rope_theta",), {"rope_parameters": kinds})
    with pytest.raises(ConfigError, match=r"Qwen3Config of transformers 4.* has no settings; install transformers 5"):
        load(tmp_path)


def test_names_of_tensors_that_version_5_changed_are_understood(tmp_path: Path) -> None:
    for model_type, names in (
        ("gpt_neox", {"embed_out.": "lm_head."}),
        ("phimoe", {"block_sparse_moe.gate.": "mlp.router.", "block_sparse_moe.experts.": "mlp.experts."}),
    ):
        folder = tmp_path / model_type
        changes = {"num_local_experts": 4, "num_experts_per_tok": 2} if model_type == "phimoe" else {}
        expected = write(folder, tiny(model_type, **changes), QuantizeConfig(group_size=32))

        def change(tensors: dict[str, Tensor], names: dict[str, str] = names) -> dict[str, Tensor]:
            assert all(any(old in key for key in tensors) for old in names)
            for old, new in names.items():
                tensors = {key.replace(old, new): value for key, value in tensors.items()}
            return tensors

        rewrite(folder, change)
        assert distance(logits(load(folder)), expected) < 1e-5
        assert not read_checkpoint(folder).damaged
