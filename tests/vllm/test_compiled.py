"""vLLM's default mode, with ``torch.compile``: same log-probabilities, and no graph of another checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from gptq_backend import QuantizeConfig
from tests.transformers.checkpoints import NAMES, ids, tiny, write
from tests.vllm.engine import Engine
from tests.vllm.test_offline import BOUND, distance, peer_distance

DEFAULT = ("llama-dynamic",)


@pytest.mark.parametrize("name", [n if n in DEFAULT else pytest.param(n, marks=pytest.mark.slow) for n in NAMES])
def test_a_compiled_model_gives_the_same_logprobs(engine: Engine, name: str) -> None:
    assert peer_distance(engine, name, enforce_eager=False) < BOUND
    assert "graph break" not in engine.text().lower()


@pytest.mark.slow
def test_mixed_experts_work_in_a_graph(engine: Engine, tmp_path: Path) -> None:
    settings = QuantizeConfig(group_size=32, dynamic={r"-:.*\.0\..*experts\.1\.": {}, r".*experts\.2\.": {"bits": 8}})
    expected = write(tmp_path / "model", tiny("mixtral"), settings)[0]
    assert distance(engine.logprobs(tmp_path / "model", ids()[0], enforce_eager=False), expected) < BOUND


@pytest.mark.slow
def test_no_graph_of_another_checkpoint_is_run(engine: Engine, tmp_path: Path) -> None:
    """Same folder, same architecture, other formats: all that vLLM would tell its cached graphs apart by is equal."""
    folder = tmp_path / "model"
    for seed, settings in enumerate(({"bits": 4}, {"bits": 4, "desc_act": True}, {"bits": 8, "sym": False})):
        shutil.rmtree(folder, ignore_errors=True)
        expected = write(folder, tiny(), QuantizeConfig(group_size=32, **settings))[0]
        # config.json is made the same, so that only the tensors differ
        config = (folder / "config.json").read_text()
        config = config.replace('"bits": 8', '"bits": 4').replace('"desc_act": true', '"desc_act": false')
        (folder / "config.json").write_text(config.replace('"sym": false', '"sym": true'))
        found = engine.logprobs(folder, ids()[0], enforce_eager=False, seed=seed)  # a new engine
        assert distance(found, expected) < BOUND


@pytest.mark.slow
def test_a_compiled_pair_of_ranks_gives_the_same_logprobs(pair: Engine) -> None:
    assert peer_distance(pair, "llama-4-64-actorder", enforce_eager=False) < BOUND


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two engines one after the other, of which each has as long as another test's
def test_a_cached_graph_is_loaded_again(start_engine: Callable[..., Engine]) -> None:
    for _ in range(2):
        engine = start_engine()
        assert peer_distance(engine, "qwen3_moe-4-32", enforce_eager=False) < BOUND
        engine.close()


def test_the_key_of_a_cached_graph_knows_the_weights_and_the_version(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.config import VllmConfig, set_current_vllm_config

    from gptq_vllm import linear

    def key(weight: str) -> str:
        config = VllmConfig()
        with set_current_vllm_config(config):
            linear.announce(weight)
        return config.compute_hash()

    first = key("4 bits cpu")
    assert key("4 bits cpu") == first != key("8 bits cpu")
    monkeypatch.setattr(linear, "__version__", "0.0.0")
    assert key("4 bits cpu") != first
