"""Decoder layers in two calls: which ones, that they give the same, and that others stay as they are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from gptq_backend import QuantizeConfig
from tests.kernels.checks import native
from tests.transformers.checkpoints import PEERS, ids, tiny, write
from tests.vllm.engine import Engine
from tests.vllm.test_offline import BOUND, distance, peer_distance

pytestmark = native
BOTH = "2 decoder layers run in two calls beside vLLM's attention"


def said(engine: Engine, run: Callable[[], None]) -> str:
    """What vLLM prints while ``run`` runs."""
    before = len(engine.text())
    run()
    return engine.text()[before:]


CASES = {
    "an argument that is not used": ("mistral", {}),
    "head norms": ("qwen3", {}),
    "four norms, whose weights count one more": ("gemma3", {}),
    "a soft cap": ("gemma2", {}),
    "norms of other names": ("glm4", {}),
    "pieces of other bits": ("llama", {"dynamic": {".*(k|up)_proj": {"bits": 8}}}),
    "act-order": ("llama", {"desc_act": True, "sym": False}),
}


@pytest.mark.parametrize("case", CASES)
def test_layers_in_two_calls_give_the_logprobs_of_the_model(engine: Engine, case: str, tmp_path: Path) -> None:
    kind, settings = CASES[case]
    expected = write(tmp_path / "model", tiny(kind), QuantizeConfig(group_size=32, **settings))[0]

    def run() -> None:
        assert distance(engine.logprobs(tmp_path / "model", ids()[0]), expected) < BOUND

    assert BOTH in said(engine, run)


@pytest.mark.parametrize("name", ["qwen2-4-64", "llama-3-32-sym"])  # biases of q, k and v; 3 bits
def test_a_peers_checkpoint_runs_in_two_calls(engine: Engine, name: str) -> None:
    options = {"max_num_seqs": 15}  # else it may be loaded already

    def run() -> None:
        assert peer_distance(engine, name, **options) < BOUND

    assert BOTH in said(engine, run)


LEFT = {"a piece of its qkv_proj is not quantized": "-:.*v_proj", "its down_proj is not quantized": "-:.*down_proj"}


@pytest.mark.parametrize("reason", LEFT)
def test_other_layers_run_module_by_module_and_it_is_said_why(engine: Engine, reason: str, tmp_path: Path) -> None:
    settings = QuantizeConfig(group_size=32, dynamic={LEFT[reason]: {}})
    expected = write(tmp_path / "model", tiny(), settings)[0]

    def run() -> None:
        assert distance(engine.logprobs(tmp_path / "model", ids()[0]), expected) < BOUND

    assert f"2 LlamaDecoderLayer run module by module: {reason}" in said(engine, run)


def test_layers_that_adapters_are_put_on_stay_as_they_are(engine: Engine) -> None:
    def run() -> None:
        assert peer_distance(engine, "llama-4-32-sym", enable_lora=True, max_lora_rank=8) < BOUND

    assert BOTH not in said(engine, run)


def test_ranks_share_layers_module_by_module(pair: Engine) -> None:
    def run() -> None:
        assert peer_distance(pair, "llama-4-32-sym") < BOUND

    assert "2 LlamaDecoderLayer run module by module: ranks share its o_proj" in said(pair, run)


# A layer of vLLM of which the second computes something else.
OTHER = """
from vllm.model_executor.models.llama import LlamaDecoderLayer
def forward(self, positions, hidden_states, residual):
    if residual is None:
        residual = hidden_states
        hidden_states = self.input_layernorm(hidden_states)
    else:
        hidden_states, residual = self.input_layernorm(hidden_states, residual)
    hidden_states = self.self_attn(positions=positions, hidden_states=hidden_states)
    if ".1." in self.self_attn.o_proj.prefix:
        hidden_states = 0.9 * hidden_states
    hidden_states, residual = self.post_attention_layernorm(hidden_states, residual)
    return self.mlp(hidden_states), residual
LlamaDecoderLayer.forward = forward
"""


def test_a_layer_that_computes_something_else_stays_as_it_is(start_engine: Callable[..., Engine]) -> None:
    engine = start_engine(TEST_RUNS_FIRST=OTHER)

    def run() -> None:
        peer_distance(engine, "llama-4-32-sym")

    text = said(engine, run)
    assert "1 decoder layers run in two calls" in text
    assert "1 LlamaDecoderLayer run module by module: it computes something else than the two calls" in text


def test_it_can_be_turned_off(start_engine: Callable[..., Engine]) -> None:
    engine = start_engine(GPTQ_BACKEND_FUSE="0")

    def run() -> None:
        assert peer_distance(engine, "llama-4-32-sym") < BOUND

    assert "decoder layers run" not in said(engine, run)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # two engines one after the other
def test_a_graph_that_another_process_compiled_runs_in_two_calls(start_engine: Callable[..., Engine]) -> None:
    found = []
    for _ in range(2):
        engine = start_engine()
        found.append(engine.logprobs(PEERS / "llama-4-32-sym", range(1, 30), enforce_eager=False))
        assert BOTH in engine.text()
        engine.close()
    torch.testing.assert_close(found[0], found[1], rtol=0, atol=0)
