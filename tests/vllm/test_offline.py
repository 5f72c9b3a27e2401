"""Offline ``LLM(...)`` on a peer's checkpoints and on every dialect found in the wild: log-probabilities are right."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from gptq_backend import QuantizeConfig
from tests.transformers.checkpoints import NAMES, PEERS, ids, load, logits, rewrite, tiny, write
from tests.transformers.test_load_checkpoints import DIALECTS
from tests.vllm.engine import Engine

BOUND = 0.02  # mean absolute difference of log-probabilities, bfloat16


def distance(found: Tensor, logits: Tensor) -> float:
    """found: [L - 1, V] log-probabilities; logits: [L, V]."""
    expected = logits.float().log_softmax(-1)[:-1]
    assert found.shape == expected.shape
    value = (found - expected).abs().mean().item()
    return value if value == value else float("inf")


def peer_distance(engine: Engine, name: str, **options: Any) -> float:
    expected = load_file(PEERS / f"{name}.expected.safetensors")
    value = distance(engine.logprobs(PEERS / name, expected["input_ids"][0], **options), expected["logits"][0])
    print(f"{name} {options}: {value:.4f}")  # pytest -rP shows it
    return value


# vLLM takes a quarter of a minute to look at an architecture that it has not seen before.
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow) if "opt" in name else name for name in NAMES]
)
def test_a_peers_checkpoint_gives_its_logprobs(engine: Engine, name: str) -> None:
    assert peer_distance(engine, name) < BOUND
    assert "Quantized layers by kernel of gptq-backend: " in engine.text()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "model"


HEAD_8 = {"lm_head": True, "dynamic": {"lm_head": {"bits": 8}}}
CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "asym with act-order": ("llama", {"sym": False, "desc_act": True, "group_size": 32}, {}),
    "2 bits": ("llama", {"bits": 2, "group_size": 32}, {}),
    "2 bits, asym, v2": ("llama", {"bits": 2, "group_size": 32, "sym": False, "checkpoint_format": "gptq_v2"}, {}),
    "3 bits in planes": ("llama", {"bits": 3, "group_size": 32, "checkpoint_format": "gptq_p"}, {}),
    "5 bits, 6 and 8 in shards": (
        "llama",
        {"bits": 5, "group_size": 32, "dynamic": {".*k_proj": {"bits": 8}, ".*up_proj": {"bits": 6, "sym": False}}},
        {},
    ),
    "mixtral, 7 bits": ("mixtral", {"bits": 7, "group_size": 32}, {}),
    "8 bits, one group": ("llama", {"bits": 8, "group_size": -1, "sym": False}, {}),
    "a ragged group": ("llama", {"group_size": 40}, {}),
    "a ragged group with act-order": ("llama", {"group_size": 40, "desc_act": True}, {}),
    "q, k and v in other bits": ("llama", {"group_size": 32, "dynamic": {".*k_proj": {"bits": 8}}}, {}),
    "a dense shard of a fused layer": (
        "llama",
        {"group_size": 32, "dynamic": {"-:.*(v_proj|gate_proj)": {}, ".*k_proj": {"sym": False}}},
        {},
    ),
    "act-order in one shard": ("llama", {"group_size": 32, "dynamic": {".*(q|up)_proj": {"desc_act": True}}}, {}),
    "gemma3": ("gemma3", {"group_size": 32}, {}),
    "mixtral": ("mixtral", {"group_size": 32}, {}),
    "mixtral, some experts dense": ("mixtral", {"group_size": 32, "dynamic": {r"-:.*\.0\..*experts\.1\.": {}}}, {}),
    "mixtral, one expert asym": ("mixtral", {"group_size": 32, "dynamic": {r".*experts\.1\.": {"sym": False}}}, {}),
    "mixtral, a layer dense": ("mixtral", {"group_size": 32, "dynamic": {r"-:.*\.0\..*experts": {}}}, {}),
    "mixtral, act-order": ("mixtral", {"group_size": 32, "desc_act": True, "bits": 3}, {}),
    "qwen3": ("qwen3", {"group_size": 32}, {}),
    "an 8-bit head": ("llama", {"group_size": 32, **HEAD_8}, {}),
    "an 8-bit head, asym": ("llama", {"group_size": 32, "sym": False, **HEAD_8}, {}),
    "a quantized head where embeddings were tied": (
        "llama",
        {"group_size": 32, "lm_head": True},
        {"tie_word_embeddings": True},
    ),
    "falcon, which sorts the rows of qkv": (
        "falcon",
        {"group_size": 32, "desc_act": True},
        {
            "head_dim": ...,
            "new_decoder_architecture": True,
            "hidden_size": 128,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "ffn_hidden_size": 512,
        },
    ),
    "a tied head left dense": ("llama", {"group_size": 32}, {"tie_word_embeddings": True}),
}


def made(folder: Path, case: str) -> Tensor:
    """Write the checkpoint of a case; returns the logits of the first prompt of :func:`ids`."""
    model_type, settings, changes = CASES[case]
    return write(folder, tiny(model_type, **changes), QuantizeConfig(**settings))[0]


IN_SHORT = (
    "2 bits, asym, v2",
    "3 bits in planes",
    "5 bits, 6 and 8 in shards",
    "8 bits, one group",
    "a ragged group with act-order",
    "q, k and v in other bits",
    "a dense shard of a fused layer",
    "mixtral, some experts dense",
    "an 8-bit head, asym",
)


@pytest.mark.parametrize(
    "case", [case if case in IN_SHORT else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_every_option_of_the_quantizer_gives_the_right_logprobs(engine: Engine, case: str, folder: Path) -> None:
    expected = made(folder, case)
    assert distance(engine.logprobs(folder, ids()[0]), expected) < BOUND


# What a dialect changes is read by the core, whose own tests have them all.
DIALECTS_IN_SHORT = ("no g_idx", "extras of TGI", "wrong bits in the config")


@pytest.mark.parametrize(
    "dialect", [n if n in DIALECTS_IN_SHORT else pytest.param(n, marks=pytest.mark.slow) for n in DIALECTS]
)
def test_every_dialect_gives_the_right_logprobs(engine: Engine, dialect: str, folder: Path) -> None:
    change, settings = DIALECTS[dialect]
    expected = write(folder, tiny(), QuantizeConfig(group_size=32))[0]
    rewrite(folder, change, **settings)
    assert distance(engine.logprobs(folder, ids()[0]), expected) < BOUND


def _with_bias(value: float) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    biases = {"layers.1.mlp.down_proj": 64, "layers.0.self_attn.v_proj": 32}
    return lambda tensors: {
        **tensors,
        **{f"model.{name}.bias": torch.full((size,), value, dtype=torch.float16) for name, size in biases.items()},
    }


@pytest.mark.parametrize("settings", [{}, {"dynamic": {r"-:.*layers\.0\..*v_proj": {}}}])
def test_a_bias_that_the_model_does_not_know_is_added(engine: Engine, folder: Path, settings: dict[str, Any]) -> None:
    plain = write(folder, tiny(), QuantizeConfig(group_size=32, **settings))[0]
    rewrite(folder, _with_bias(0.5))
    model = load(folder)
    # transformers reports that of a dense layer as unexpected, and leaves it out.
    model.model.layers[0].self_attn.v_proj.bias = nn.Parameter(torch.full((32,), 0.5))
    expected = logits(model)[0]
    found = engine.logprobs(folder, ids()[0])
    assert distance(found, expected) < BOUND < distance(found, plain)


def test_the_settings_in_quantize_config_are_read(engine: Engine, folder: Path) -> None:
    expected = write(folder, tiny(), QuantizeConfig(group_size=32, desc_act=True))[0]
    config = json.loads((folder / "config.json").read_text())
    (folder / "quantize_config.json").write_text(json.dumps(config.pop("quantization_config")))
    (folder / "config.json").write_text(json.dumps(config))
    assert distance(engine.logprobs(folder, ids()[0]), expected) < BOUND


def test_a_quantized_head_is_used_though_the_config_ties_it(engine: Engine, folder: Path) -> None:
    model = tiny(tie_word_embeddings=True)
    settings = QuantizeConfig(group_size=32, lm_head=True, dynamic={"lm_head": {"bits": 2}})  # coarse, so it shows
    expected = write(folder, model, settings)[0]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    assert distance(engine.logprobs(folder, ids()[0]), expected) < BOUND


def test_a_batch_gives_the_tokens_of_its_prompts_alone(engine: Engine) -> None:
    folder = PEERS / "qwen3_moe-4-32"
    prompts = [list(range(3 + i, 20 + 2 * i)) for i in range(5)]
    together = engine.tokens(folder, prompts, 8)
    assert all(len(tokens) == 8 for tokens in together)
    assert engine.tokens(folder, prompts[:1], 8)[0] == together[0]


@pytest.mark.parametrize("name", ["llama-dynamic", pytest.param("qwen3_moe-4-32", marks=pytest.mark.slow)])
def test_other_dtypes_are_served(engine: Engine, name: str) -> None:
    assert peer_distance(engine, name, dtype="float16") < BOUND
    assert peer_distance(engine, name, dtype="float32") < 1e-3
